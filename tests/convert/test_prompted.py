"""APT: prompts beside attention, against loops over tokens and prompts; under generate, padding and checkpointing."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.convert.prompted import add_prompts, load_prompts, remove_prompts, save_prompts, without_prompts

SIZES = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2,
    "intermediate_size": 20, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])


def tiny(kind: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def tuned(kind: str = "llama", **more: Any) -> Any:
    model = add_prompts(tiny(kind), 5, rank=2, **more)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_attention" in name:
                parameter.normal_(0, 0.3)
    return model


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def by_loops(own: Any, x: list[float], attended: list[float]) -> list[float]:
    """One token."""
    prompts, down, up = own.prompts.tolist(), own.down.weight.tolist(), own.up.weight.tolist()
    scores = []
    for prompt in prompts:
        small = [sum(a * b for a, b in zip(row, prompt, strict=True)) for row in down]
        key = [p + sum(a * b for a, b in zip(row, small, strict=True)) for p, row in zip(prompt, up, strict=True)]
        scores.append(max(0.0, sum(a * b for a, b in zip(x, key, strict=True))))
    share = max(scores)
    added = [share * sum(s * p[f] for s, p in zip(scores, prompts, strict=True)) for f in range(len(x))]
    return [(a + e) * math.exp(own.scale.item()) for a, e in zip(attended, added, strict=True)]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_equals_loops_over_tokens_and_prompts(kind: str) -> None:
    model = tuned(kind, layers=[1])
    seen: list[Any] = []
    attention = model.model.layers[1].self_attn
    attention.prompt_attention.register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    logits(model)
    ((x, attended, out),) = seen
    want = [
        [by_loops(attention.prompt_attention, *token) for token in zip(*row, strict=True)]
        for row in zip(x.tolist(), attended.tolist(), strict=True)
    ]
    torch.testing.assert_close(out, torch.tensor(want, dtype=torch.float64))
    with torch.no_grad():  # what it read is what the queries are projected from
        torch.testing.assert_close(attended, remove_prompts(model).model.layers[1].self_attn(x, **_given(model))[0])


def _given(model: Any) -> dict[str, Any]:
    places = torch.arange(6)[None]
    mask = torch.full((1, 1, 6, 6), -torch.inf, dtype=torch.float64).triu(1)
    return {"position_embeddings": model.model.rotary_emb(torch.zeros(1).double(), places), "attention_mask": mask}


def test_prompts_of_zero_without_and_out_are_the_model() -> None:
    model = tuned()
    before = logits(tiny())
    assert (logits(model) - before).abs().max() > 1e-2
    with without_prompts(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.prompt_attention.prompts.zero_()
            layer.self_attn.prompt_attention.scale.zero_()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    again = tuned()
    torch.testing.assert_close(logits(remove_prompts(again)), before, rtol=0, atol=0)
    assert again.state_dict().keys() == tiny().state_dict().keys()
    assert not any(layer.self_attn._forward_hooks for layer in again.model.layers)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_generation_with_a_cache_is_that_without(more: dict[str, Any]) -> None:
    model = tuned()
    options = {"max_new_tokens": 7, "do_sample": False, **more}
    want = model.generate(IDS, use_cache=False, **options)
    torch.testing.assert_close(model.generate(IDS, **options), want)
    with without_prompts(model):
        assert not torch.equal(model.generate(IDS, **options), want)


def test_left_padding_changes_nothing() -> None:
    model = tuned()
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (ids > 0).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(logits(model, ids, attention_mask=mask, position_ids=places)[:, 3:], logits(model))
    told = [model.generate(rows, max_new_tokens=5, do_sample=False)[:, -5:] for rows in (IDS,)]
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, -5:]
    torch.testing.assert_close(padded, told[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_prompts_learn_and_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = tuned().train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompt_attention" in name for name in trained)
    assert len(trained) == 2 * 4
    model.enable_input_require_grads()
    found = []
    for anew in (False, True):
        for layer in model.model.layers:
            layer.gradient_checkpointing = anew
            layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                f, *a, use_reentrant=reentrant
            )
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in trained.values()])
        model.zero_grad()
    torch.testing.assert_close(*found)
    assert all(grad.abs().max() > 0 for grad in found[0])


def test_the_largest_score_gets_no_gradient() -> None:
    model = tuned(layers=[0])
    own = model.model.layers[0].self_attn.prompt_attention
    x, attended = torch.randn(1, 1, 24, dtype=torch.float64), torch.zeros(1, 1, 24, dtype=torch.float64)
    own(x, attended).sum().backward()
    prompts = own.prompts.detach().clone().requires_grad_()
    scores = (x @ (prompts + prompts @ own.down.weight.T @ own.up.weight.T).mT).relu()
    (scores.max().item() * (scores @ prompts).sum() * own.scale.exp()).backward()
    torch.testing.assert_close(own.prompts.grad, prompts.grad)


def test_a_copy_has_prompts_of_its_own() -> None:
    model = tuned()
    other = copy.deepcopy(model)
    want = logits(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.prompt_attention.prompts.mul_(2)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)
    assert (logits(other) - want).abs().max() > 1e-3


def test_a_small_file_brings_them_back_to_the_same_model_alone(tmp_path: Path) -> None:
    model = tuned(layers=[1])
    want = logits(model)
    path = save_prompts(model, tmp_path / "prompts.safetensors")
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)
    kept = sum(p.numel() for p in model.parameters() if p.requires_grad) * 8
    assert kept < path.stat().st_size < kept + 4000
    torch.testing.assert_close(logits(load_prompts(tiny(), path)), want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="beside another model"):
        load_prompts(tiny(seed=3), path)
    with pytest.raises(ValueError, match="has prompts already"):
        load_prompts(tuned(), path)


def test_training_brings_the_loss_down_and_leaves_the_model() -> None:
    model = add_prompts(tiny(), 8).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with without_prompts(model.eval()):
        torch.testing.assert_close(logits(model), logits(tiny()), rtol=0, atol=0)


def test_bfloat16_stays_bfloat16() -> None:
    model = add_prompts(tiny().bfloat16(), 5)
    assert logits(model).dtype == torch.bfloat16
    for layer in model.model.layers:
        layer.self_attn.prompt_attention.float()
    assert logits(model).dtype == torch.bfloat16


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has prompts already"):
        add_prompts(tuned())
    with pytest.raises(ValueError, match="has layers 0 to 1"):
        add_prompts(tiny(), layers=[2])
    with pytest.raises(ValueError, match="prompts=0: want 1 or more"):
        add_prompts(tiny(), 0)
    with pytest.raises(ValueError, match="no prompts to save"):
        save_prompts(tiny(), tmp_path / "x.safetensors")
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match="no converter for its layout"):
        add_prompts(gpt2)
    (tmp_path / "y.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        load_prompts(tiny(), tmp_path / "y.safetensors")
