"""Pooling of key/value heads: the equation in loops, what must leave a model as it was, and the order of damage."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.grouped import aligned, grouped
from manyheads.convert.layout import FAMILIES, attentions, cache_numbers
from manyheads.hosts.loading import load_model
from manyheads.hosts.questions import Questions, library_text

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROWS = [list(range(1, 41)), list(range(40, 0, -1))]


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, **({"head_dim": 4} if kind in ("llama", "gemma2") else {}), **more}
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.normal_(0, 0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ROWS)).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_turned_heads_leave_the_model_as_it_was(kind: str) -> None:
    model = tiny(kind)
    turned = aligned(model, 2, ROWS)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), turned.parameters(), strict=True))
    # Angles of rotary positions are float32 in every family.
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("align", ["mean", "first", "procrustes"])
def test_equal_heads_of_a_group_are_pooled_exactly(kind: str, align: str) -> None:
    model = tiny(kind)
    with torch.no_grad():
        for layer in attentions(model):
            for part in ("k_proj", "v_proj"):
                linear = layer.projections()[part]
                heads = linear.weight.view(2, 2, layer.head_dim, -1)
                heads[:, 1] = heads[:, 0]
                if linear.bias is not None:
                    bias = linear.bias.view(2, 2, layer.head_dim)
                    bias[:, 1] = bias[:, 0]
    small = grouped(model, 2, align=align, calibration=ROWS)
    assert type(small) is type(model)
    assert small.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)
    assert cache_numbers(small) * 2 == cache_numbers(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_the_mean_in_loops(kind: str) -> None:
    model = tiny(kind)
    for old, new in zip(attentions(model), attentions(grouped(model, 2, align="mean")), strict=True):
        d = old.head_dim
        for part in ("k_proj", "v_proj"):
            was, now = old.projections()[part], new.projections()[part]
            for g in range(2):
                for i in range(d):
                    rows = [was.weight[(2 * g + h) * d + i] for h in range(2)]
                    torch.testing.assert_close(now.weight[g * d + i], sum(rows) / 2)
                    if was.bias is not None:
                        biases = [was.bias[(2 * g + h) * d + i] for h in range(2)]
                        torch.testing.assert_close(now.bias[g * d + i], sum(biases) / 2)
        torch.testing.assert_close(new.projections()["q_proj"].weight, old.projections()["q_proj"].weight)
        torch.testing.assert_close(new.module.o_proj.weight, old.module.o_proj.weight)


def test_as_many_heads_as_before_is_the_same_model() -> None:
    model = tiny("mistral")
    torch.testing.assert_close(logits(grouped(model, 4, align="mean")), logits(model), rtol=0, atol=0)


def test_the_given_model_is_left_alone() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grouped(model, 1, calibration=ROWS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.config.num_key_value_heads == 4


def test_alignment_brings_heads_that_were_turned_apart_back_together() -> None:
    """Two heads of a group are one head, turned: after alignment their mean loses nothing."""
    model = tiny("llama", num_hidden_layers=1)
    (layer,) = attentions(model)
    d, half = layer.head_dim, layer.head_dim // 2
    with torch.no_grad():
        keys, values = (getattr(layer.module, part).weight.view(2, 2, d, -1) for part in ("k_proj", "v_proj"))
        queries = layer.module.q_proj.weight.view(2, 2, 2, d, -1)
        out = layer.module.o_proj.weight.view(-1, 2, 2, 2, d)
        angle = torch.tensor([0.7, -2.0]).double()[:half, None]
        turn = torch.linalg.qr(torch.randn(d, d).double())[0]
        for group in range(2):
            a, b = keys[group, 0, :half].clone(), keys[group, 0, half:].clone()
            keys[group, 1] = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])
            values[group, 1] = turn @ values[group, 0]
            out[:, group, 1] = torch.randn(out.shape[0], 2, d).double()
            queries[group, 1].normal_()
    exact = grouped(model, 2, calibration=ROWS)
    torch.testing.assert_close(logits(exact), logits(model), rtol=1e-4, atol=1e-4)
    lossy = grouped(model, 2, align="mean")
    assert (logits(lossy) - logits(model)).abs().max() > 0.05


def test_what_cannot_be_pooled_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="can be pooled into 1, 2, 4"):
        grouped(model, 3)
    with pytest.raises(ValueError, match="needs calibration text"):
        grouped(model, 2)
    with pytest.raises(ValueError, match="--align 'svd': want one of"):
        grouped(model, 2, align="svd")
    with pytest.raises(ValueError, match="has no converter for its layout"):
        grouped(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)), 1)
    model.model.layers[1].self_attn.k_proj = torch.nn.Sequential(model.model.layers[1].self_attn.k_proj)
    with pytest.raises(ValueError, match="merge adapters"):
        grouped(model, 2, align="mean")


def test_the_order_of_damage_on_the_packaged_model() -> None:
    """Aligned < mean < first < random, as published (the mean above the first head, arXiv:2305.13245)."""
    loaded = load_model()
    learnt = Questions(loaded, text=library_text(), seed=1)
    judge = Judge(loaded, Questions(loaded), Sizes(windows=2, length=256, keys=1, key_length=192))
    rows = calibration_rows(learnt, 2048, 256)
    bits = {}
    for align in ("procrustes", "mean", "first", "random"):
        torch.manual_seed(0)
        bits[align] = judge.distance(grouped(loaded.model, 2, align=align, calibration=rows))["bits_per_token"]
    assert bits["procrustes"] + 0.2 < bits["mean"] < bits["first"] - 0.2 < bits["random"] - 0.4, bits
