"""Weights of the layer below, over own values: as loops, in models and caches; Skimformer, and its mask for BERT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from manyheads.mechanisms.mixing.shared_weights import SharedWeights
from manyheads.mechanisms.position.skim import Skim
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM, ManyheadsForSequenceClassification

SIZES: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool) -> None:
    torch.manual_seed(0)
    module, x = SharedWeights(8, 2, causal=causal).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    given, real = torch.rand(2, 2, 5, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    real[1, :2] = False
    values, mixed = x @ module.v_proj.weight.T, torch.zeros_like(x)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                for j in range(i + 1 if causal else 5):
                    if real[b, j]:
                        mixed[b, i, 4 * h : 4 * h + 4] += given[b, h, i, j] * values[b, j, 4 * h : 4 * h + 4]
    assert_close(module(x, mask=real, weights_below=given).output, mixed @ module.o_proj.weight.T)


def model(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = ManyheadsConfig(
        **{**SIZES, "num_hidden_layers": 3, "layers": ["softmax", "shared-weights", "shared-weights"], **settings}
    )
    return ManyheadsForCausalLM(config).double().eval()


@torch.no_grad()
def test_a_model_computes_weights_once() -> None:
    one, x = model(), ids(2, 7)
    found = one(x, output_attentions=True, use_cache=False).attentions
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert_close(one(x).logits, one(x, output_attentions=True, use_cache=False).logits)
    assert one(x).attentions is None
    cache, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        out = one(x[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), one(x).logits)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    assert_close(one(x, mask).logits[1, 3:], one(x[1:, 3:]).logits[0])
    how = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert one.generate(x, **how).equal(one.generate(x, use_cache=False, **how))
    places = torch.cat([torch.arange(4), torch.arange(3)])[None]
    packed = one(x[:1], position_ids=places, use_cache=False).logits
    assert_close(packed, torch.cat([one(x[:1, :4]).logits, one(x[:1, 4:]).logits], 1))


def test_gradients_reach_the_weights_through_checkpoints() -> None:
    found = []
    for again in (False, True):
        one = model()
        if again:
            one.activation_checkpointing_enable({"use_reentrant": True})
            one.enable_input_require_grads()
        one.train()
        one(ids(2, 7), labels=ids(2, 7)).loss.backward()
        found.append([p.grad for p in one.parameters()])
    assert_close(found[0], found[1])
    assert float(one.model.stack.layers[0].self_attn.mechanism.k_proj.weight.grad.abs().sum()) > 0


def test_what_it_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0, shared-weights, takes the weights of the layer below it"):
        model(layers=["shared-weights"])(ids(1, 4))
    with pytest.raises(ValueError, match=r"weights_below is \[1, 2, 4, 4\].*want \[1, 4, 4, 4\]"):
        model(num_hidden_layers=2, layers=[{"name": "softmax", "heads": 2}, "shared-weights"])(ids(1, 4))
    with pytest.raises(ValueError, match=r"\['weights_below'\] missing"):
        SharedWeights(8, 2)(torch.randn(1, 3, 8), weights_below=None)


def boxes(b: int, n: int) -> torch.Tensor:
    found = torch.randint(10, (b, n, 4), generator=torch.Generator().manual_seed(1))
    found[..., 2:] += 9
    return found


@torch.no_grad()
def test_skimformer_computes_the_attention_of_the_layout_once() -> None:
    torch.manual_seed(0)
    layers = [{"name": "skim", "side_dim": 6, "places": 20}, "shared-weights"]
    config = ManyheadsConfig(**SIZES, num_hidden_layers=2, layers=layers, positions="none")
    one, at = ManyheadsForSequenceClassification(config).double().eval(), boxes(2, 7)
    out = one(ids(2, 7), boxes=at, output_attentions=True)
    assert_close(out.attentions[1], out.attentions[0])
    below, above = (block.self_attn.mechanism for block in one.model.stack.layers)
    full = Skim(16, 4, side_dim=6, places=20).double()
    full.load_state_dict({**below.state_dict(), **above.state_dict()}, strict=False)
    full.v_proj.bias.zero_()
    full.o_proj.bias.zero_()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert_close(above(x, weights_below=out.attentions[0]).output, full(x, boxes=at).output)


@torch.no_grad()
def test_another_model_attends_by_the_mask() -> None:
    torch.manual_seed(0)
    skim, at = Skim(16, 2, side_dim=6, places=20).double(), boxes(2, 6)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    mask = skim.skimmed(at, 2, mask=real)
    assert mask.shape == (2, 2, 6, 6)
    assert mask.sum(-1).eq(2).all()
    assert not mask[1, :, :, 4:].any()
    weights = skim(torch.randn(2, 6, 16, dtype=torch.float64), boxes=at, mask=real, need_weights=True).weights
    assert weights[mask].min() >= weights.masked_fill(mask, 0)[..., :].amax(-1).min()
    for row in weights.masked_fill(mask, 0).amax(-1).flatten() <= weights.masked_fill(~mask, 1).amin(-1).flatten():
        assert row
    config = BertConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False).double().eval()
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    out = bert(ids(2, 6), attention_mask=added, output_attentions=True)
    for found in out.attentions:
        assert float(found.masked_fill(mask, 0).max()) == 0
    with pytest.raises(ValueError, match="top_k=0 must be positive"):
        skim.skimmed(at, 0)
    with pytest.raises(ValueError, match="boxes go from 0 to 18"):
        Skim(16, 2, side_dim=6, places=5).skimmed(at, 2)
