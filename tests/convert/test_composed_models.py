"""CALM: two frozen models and the cross attention between them, against loops, with a cache, padding and beams."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

from manyheads.convert.composed import Composed, compose, load_composed

SIZES = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 3,
    "intermediate_size": 20, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
PAIRS = [(0, 0), (1, 2)]
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])


def tiny(kind: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def pair(kind: str = "llama", **more: Any) -> tuple[Any, Any]:
    return tiny(kind, **more), tiny("qwen3", 1, hidden_size=16, num_hidden_layers=2, head_dim=4)


def composed(kind: str = "llama", **more: Any) -> Composed:
    made = compose(*pair(kind, **more), PAIRS, tokenizers=None)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in made.bridges.parameters():
            parameter.normal_(0, 0.3)
    return made


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def loops(bridge: Any, own: Tensor, other: Tensor) -> Tensor:
    """What a bridge adds to own [n, e] that reads other [n, e']."""
    d, rows = bridge.head_dim, []
    read = other @ bridge.proj.weight.T
    q, k, v = own @ bridge.q_proj.weight.T, read @ bridge.k_proj.weight.T, read @ bridge.v_proj.weight.T
    for i in range(len(own)):
        heads = []
        for h in range(bridge.heads):
            part = slice(h * d, (h + 1) * d)
            terms = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(d)) for j in range(i + 1)]
            heads.append(sum(t * v[j, part] for j, t in enumerate(terms)) / sum(terms))
        rows.append(bridge.o_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_equals_loops_over_tokens_and_heads(kind: str) -> None:
    made = composed(kind)
    with torch.no_grad():
        states = made.augmenting(IDS, output_hidden_states=True).hidden_states
        read = {0: states[1]}
        hooks = [made.augmenting.model.layers[1].register_forward_hook(lambda m, a, out: read.__setitem__(1, out))]
        made.augmenting(IDS)
        want = made(IDS).logits
        for bridge, (source, target) in zip(made.bridges, PAIRS, strict=True):

            def add(module: Any, args: Any, out: Tensor, bridge: Any = bridge, source: int = source) -> Tensor:
                return out + torch.stack([loops(bridge, *both) for both in zip(out, read[source], strict=True)])

            hooks.append(made.anchor.model.layers[target].register_forward_hook(add))
        torch.testing.assert_close(made.anchor(IDS).logits, want)
        for hook in hooks:
            hook.remove()
        assert (made.anchor(IDS).logits - want).abs().max() > 1e-2  # and the anchor alone is as it was


def test_a_new_composition_is_its_anchor() -> None:
    anchor, augmenting = pair()
    before = logits(anchor)
    torch.testing.assert_close(logits(compose(anchor, augmenting, PAIRS, tokenizers=None)), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_cache_filled_in_parts_equals_one_pass(kind: str) -> None:
    made = composed(kind, sliding_window=4) if kind == "mistral" else composed(kind)
    cache, parts = None, []
    for step in IDS.split([2, 1, 3], 1):
        with torch.no_grad():
            out = made(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits(made))
    assert len(cache.layers) == 3 + 2 + 2


def test_left_padding_changes_nothing_with_and_without_a_cache() -> None:
    made = composed()
    want = logits(made, IDS[1:])
    ids = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), IDS[1]]), torch.arange(1, 10)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(logits(made, ids, attention_mask=mask, position_ids=places)[:1, 3:], want)
    told = made.generate(IDS[1:], max_new_tokens=6, do_sample=False)[0, -6:]
    padded = made.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, -6:]
    torch.testing.assert_close(padded, told)


@pytest.mark.parametrize("more", [{"do_sample": False}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_generation_with_a_cache_is_that_without(more: dict[str, Any]) -> None:
    made = composed()
    ids = IDS[:1] if "prompt_lookup_num_tokens" in more else IDS
    plain = {key: value for key, value in more.items() if key != "prompt_lookup_num_tokens"}
    config = GenerationConfig(max_new_tokens=7, pad_token_id=0, **more)
    want = made.generate(ids, max_new_tokens=7, use_cache=False, **plain)
    torch.testing.assert_close(made.generate(ids, generation_config=config), want)
    alone = made.anchor.generate(ids, max_new_tokens=7, use_cache=False, **plain)
    assert not torch.equal(alone, want)


def test_a_second_turn_goes_on_from_the_cache_of_the_first() -> None:
    made = composed()
    first = made.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, IDS[:, :3]], 1)
    told = made.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=first.past_key_values)
    torch.testing.assert_close(told, made.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_only_the_bridges_learn_and_checkpointing_gives_the_same_gradients() -> None:
    made = composed().train()
    found = []
    for anew in (False, True):
        for layer in made.anchor.model.layers:
            layer.gradient_checkpointing = anew
            layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                f, *a, use_reentrant=False
            )
        losses = [made(ids, labels=ids).loss for ids in (IDS, IDS.flip(1))]  # both passes before the first backward
        for loss in losses:
            loss.backward()
        found.append([parameter.grad.clone() for parameter in made.bridges.parameters()])
        made.zero_grad()
    torch.testing.assert_close(*found)
    assert all(grad.abs().max() > 0 for grad in found[0])
    assert all(not p.requires_grad and p.grad is None for m in (made.anchor, made.augmenting) for p in m.parameters())
    assert not made.augmenting.training


def test_training_brings_the_loss_down() -> None:
    made = compose(*pair(), PAIRS, tokenizers=None).train()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = made(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_it_opens_again_between_the_same_models_alone(tmp_path: Path) -> None:
    made = composed()
    path = made.save(tmp_path / "bridge.safetensors")
    torch.testing.assert_close(logits(load_composed(path, *pair())), logits(made), rtol=0, atol=0)
    kept = sum(p.numel() for p in made.bridges.parameters()) * 8
    assert kept < path.stat().st_size < kept + 4000
    with pytest.raises(ValueError, match="beside another augmenting"):
        load_composed(path, pair()[0], tiny("qwen3", 7, hidden_size=16, num_hidden_layers=2, head_dim=4))


def test_bfloat16_models_keep_their_dtype() -> None:
    made = composed()
    want = logits(made)
    half = compose(made.anchor.bfloat16(), made.augmenting.bfloat16(), PAIRS, tokenizers=None)
    half.bridges.load_state_dict(made.bridges.state_dict())
    assert logits(half).dtype == torch.bfloat16
    torch.testing.assert_close(logits(half).double(), want, rtol=0.1, atol=0.4)
    half.bridges.float()  # trained in float32, between models in bfloat16
    torch.testing.assert_close(logits(half).double(), want, rtol=0.1, atol=0.4)


class Words:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_models_that_do_not_fit_are_refused() -> None:
    anchor, augmenting = pair()
    with pytest.raises(ValueError, match=r"read a text as other ids \(2 and 2 tokens\)"):
        compose(anchor, augmenting, PAIRS, tokenizers=(Words("a", "b"), Words("b", "a")))
    with pytest.raises(ValueError, match="the anchor has 40 ids and the augmenting model 41"):
        compose(anchor, tiny("llama", vocab_size=41), PAIRS, tokenizers=None)
    for pairs in ([], [(2, 0)], [(0, 3)], [(0, 1), (1, 1)]):
        with pytest.raises(ValueError, match="want \\(layer of the augmenting model, layer of the anchor\\)"):
            compose(anchor, augmenting, pairs, tokenizers=None)
    with pytest.raises(ValueError, match="load it twice"):
        compose(anchor, anchor, PAIRS, tokenizers=None)
    t5 = AutoConfig.for_model("t5", d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40)
    with pytest.raises(ValueError, match="the augmenting model is a T5"):
        compose(anchor, type("T5", (), {"config": t5})(), PAIRS, tokenizers=None)


def test_calls_that_would_be_wrong_are_refused() -> None:
    made = composed()
    with pytest.raises(ValueError, match="no inputs_embeds"):
        made(inputs_embeds=torch.zeros(1, 2, 24).double())
    with pytest.raises(ValueError, match="attention_mask \\[b, n\\]"):
        made(IDS, attention_mask=torch.ones(2, 1, 6, 6).bool())
    with pytest.raises(ValueError, match="packed rows"):
        made(IDS[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="use hooks"):
        made(IDS, output_hidden_states=True)
    with pytest.raises(ValueError, match="not in a StaticCache"):
        made(IDS, past_key_values=StaticCache(config=made.config, max_cache_len=8))
    filled = DynamicCache(config=made.config)
    made.anchor(IDS, past_key_values=filled)
    with pytest.raises(ValueError, match="filled by another model"):
        made(IDS, past_key_values=filled)
    assert type(made.anchor.model.layers[0]).__name__ == "LlamaDecoderLayer"
