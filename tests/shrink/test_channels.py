"""ThinK: which channels of keys are kept, what attention then says, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formula_llama import SETTINGS
from formula_llama import prompt as formula_prompt
from formula_llama import weights as formula_weights
from loops import ENDS, LEFT, batch
from recorder import feed, recording, show_only
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from manyheads.shrink import H2O, AdaKV, Full, KeyNorm, SnapKV, ThinK, release
from manyheads.shrink.variants import Profiles, read_variants

WINDOW = 5


def _channels(queries: Tensor, keys: Tensor, slots: list[int], first: int, dropped: int) -> list[int]:
    """By loops: queries [r, n, d] of a context from slot 0, keys [n, d]; the channels kept, of one KV head."""
    r, n, d = queries.shape
    asked = [place for place in range(n - WINDOW, n) if place >= first]
    importance = []
    for channel in range(d):
        q = sum(float(queries[i, place, channel]) ** 2 for i in range(r) for place in asked) / r / len(asked)
        k = sum(float(keys[slot, channel]) ** 2 for slot in slots) / len(slots)
        importance.append(q * k)
    return sorted(sorted(range(d), key=lambda c: importance[c])[dropped:])


@pytest.mark.parametrize("policy", [Full, SnapKV, H2O], ids=["all", "snapkv", "h2o"])
def test_channels_and_attention(policy: Any) -> None:
    """Of a padded batch: the channels by loops; logits are a dense cache's whose older keys have zeros elsewhere."""
    storage = ThinK(key_channel_compression_ratio=0.4, window_size=WINDOW)
    given = {} if policy is Full else {"budget_tokens": 12} | ({"window_size": 3} if policy is SnapKV else {})
    model, (tokens, padding) = tiny("llama").double(), batch()
    cache = policy(storage=storage, **given).make_cache(model)
    with recording() as steps:
        logits = feed(model, cache, tokens, padding, ENDS)
    kept: dict[int, Tensor] = {}
    for layer, own in steps.items():
        step, dim = own[0], own[0].keys.shape[3]
        kept[layer] = torch.zeros(2, 2, dim, dtype=torch.bool)
        for (row, head), slots in step.after.items():
            held = [slot for slot in slots if slot >= LEFT[row]]
            queries = step.queries[row, 2 * head : 2 * head + 2]
            channels = _channels(queries, step.keys[row, head], held, LEFT[row], int(dim * 0.4))
            kept[layer][row, head, channels] = True
            found = cache.layers[layer].store.codec.kept["channels"]
            assert found[row, head].tolist() == channels
    release(model)

    class Pruned(DynamicCache):
        """Zeros in the channels left out, of all but the latest tokens of what was fed before this pass."""

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            seen = self.get_seq_length(layer_idx)
            whole, values = super().update(keys, values, layer_idx, *args, **kwargs)
            if not seen:
                return whole, values
            # Before a pass the latest WINDOW of what was fed are whole, and all that is new.
            old = torch.arange(whole.shape[2]) < seen - WINDOW
            if keys.shape[2] > 0:
                whole = torch.where(old[:, None] & ~kept[layer_idx][:, :, None], 0, whole)
            return whole, values

    dense = tiny("llama").double()
    show_only(dense, steps)
    wanted = feed(dense, Pruned(config=dense.config), tokens, padding, ENDS)
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_narrower_keys(dtype: torch.dtype) -> None:
    model = tiny("llama", head_dim=32).to(dtype)
    held = []
    for storage in (None, ThinK(key_channel_compression_ratio=0.5, window_size=4)):
        cache = KeyNorm(budget_tokens=100, when="prefill", storage=storage).make_cache(model)
        with torch.no_grad():
            model(prompt(1, 200), past_key_values=cache, logits_to_keep=1)
        rows = [row for layer in cache.layers for group in layer.store.groups for row in group.rows.values()]
        own = sum(row.untyped_storage().nbytes() for row in rows)
        codec = [layer.store.codec.nbytes for layer in cache.layers if layer.store.codec is not None]
        assert cache.nbytes == own + sum(codec)
        held.append(own)
    # Of 32 + 32 numbers of an entry 16 are left out; its slot of 4 bytes stays.
    size = dtype.itemsize
    assert held[1] / held[0] == (48 * size + 4) / (64 * size + 4)


def test_a_budget_in_bytes_holds() -> None:
    model = tiny("llama")
    budget = 3 * 2 * 40 * 8 * 4 * 2
    cache = H2O(budget_bytes=budget, storage=ThinK(window_size=4)).make_cache(model)
    tokens = prompt(1, 90)
    with torch.no_grad():
        model(tokens[:, :70], past_key_values=cache)
        for i in range(70, 90):
            model(tokens[:, i : i + 1], past_key_values=cache)
    assert budget * 0.7 < cache.nbytes <= budget
    assert min(min(own) for own in cache.lengths()) < 60


def test_beams_guesses_and_uneven_heads() -> None:
    """Text is the same with guesses; beams reorder what is kept, before and after channels are chosen."""
    model, tokens = tiny("llama"), prompt(2, 24)
    policy = H2O(budget_tokens=14, allocation=AdaKV(), storage=ThinK(window_size=6))
    with policy(model):
        alone = model.generate(tokens[:1], max_new_tokens=12, do_sample=False)
        guessed = model.generate(tokens[:1], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(alone, guessed)
        both = model.generate(tokens, max_new_tokens=8, num_beams=3, do_sample=False)
        one = model.generate(tokens[:1], max_new_tokens=8, num_beams=3, do_sample=False)
    assert both.shape[0] == 2
    assert torch.equal(both[0, : one.shape[1]], one[0])
    late = Full(storage=ThinK(window_size=40)).make_cache(model)
    late.activate_past_recording()
    out = model.generate(tokens, max_new_tokens=30, num_beams=2, do_sample=False, past_key_values=late)
    assert out.shape[0] == 2
    release(model)


def test_channels_are_kvpress() -> None:
    stored = json.loads((Path(__file__).parent / "kvpress_channels.json").read_text())
    assert stored["kvpress"] == "0.5.5"
    for case in stored["cases"]:
        model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).double().eval()
        model.load_state_dict(formula_weights({name: tuple(own.shape) for name, own in model.named_parameters()}))
        storage = ThinK(key_channel_compression_ratio=case["ratio"], window_size=case["window_size"])
        cache = Full(storage=storage).make_cache(model)
        with torch.no_grad():
            model(inputs_embeds=formula_prompt(), past_key_values=cache)
        kept = [layer.store.codec.kept["channels"][0].tolist() for layer in cache.layers]
        assert kept == case["kept"]
    assert len(stored["cases"]) == 4


def test_from_the_command_line() -> None:
    loaded: Any = type("Loaded", (), {"name": "x"})()
    texts = ["snapkv[storage=think(window_size=8)]", "full[storage=think(key_channel_compression_ratio=0.4)]"]
    found = [own.build() for own in read_variants(texts, [("compression_ratio", 0.5)], Profiles(loaded, None))]
    assert [own.storage for own in found] == [ThinK(window_size=8), ThinK(key_channel_compression_ratio=0.4)]


@pytest.mark.parametrize(("given", "match"), [
    ({"key_channel_compression_ratio": 1.0}, "from 0 to below 1; got 1.0"),
    ({"key_channel_compression_ratio": "half"}, "from 0 to below 1; got 'half'"),
    ({"window_size": 0}, "window_size must be a whole number of at least 1"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ThinK(**given)
