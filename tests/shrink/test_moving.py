"""positions="cache": what is kept stands side by side, whatever the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formula_llama import PROMPT, SETTINGS, numbers
from formula_llama import prompt as formula_prompt
from formula_llama import weights as formula_weights
from loops import ENDS, LEFT, batch, watched
from test_expected import rotation
from test_fast_kvzip import gates
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    Composed,
    Duo,
    ExpectedAttention,
    FastKVzip,
    Finch,
    KeyNorm,
    KVzip,
    LagKV,
    Leverage,
    LoCoCo,
    MoA,
    Policy,
    PyramidKV,
    Quantised,
    Razor,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    release,
)

MOVED: dict[str, Any] = {"positions": "cache"}
POLICIES: list[Policy] = [
    SnapKV(budget_tokens=9, window_size=3, **MOVED),
    SnapKV(budget_tokens=9, window_size=3, when="passes", allocation=AdaKV(), **MOVED),
    SnapKV(budget_tokens=9, window_size=3, allocation=PyramidKV(), **MOVED),
    H2O(budget_tokens=9, **MOVED),
    TOVA(budget_tokens=9, interval=2, **MOVED),
    KeyNorm(compression_ratio=0.5, **MOVED),
    LagKV(budget_tokens=14, sink_size=2, lag_size=4, **MOVED),
    ExpectedAttention(budget_tokens=9, sink_size=2, interval=1, **MOVED),
    ChunkKV(base=KeyNorm(), budget_tokens=9, chunk_length=4, **MOVED),
    ChunkKV(base=Finch(window_size=2), budget_tokens=20, chunk_length=4),
    MoA(rule=(4.0, 0.1), sink_size=2, **MOVED),
    Duo(gates=[[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]], sink_size=2, recent_size=5, compression_ratio=0.5, **MOVED),
    SimLayerKV(lazy_threshold=0.01, recent_size=4, **MOVED),
    KVzip(compression_ratio=0.5, sink_size=2, **MOVED),
    FastKVzip(gates=gates(), compression_ratio=0.5, sink_size=2, **MOVED),
    Composed(SnapKV(budget_tokens=12, window_size=3, **MOVED), TOVA(budget_tokens=9, when="decode")),
]


def _stand_together(cache: Any, came: dict[int, Tensor], turning: int) -> int:
    """Every key is the one that came, turned by as many positions as it stands away from its place; how many moved."""
    moved = 0
    for layer, own in enumerate(cache.layers):
        for group in own.store.groups:
            slots, keys = group.slots(), group.view("keys")
            slots = slots.expand(*keys.shape[:3])
            for row, first in enumerate(LEFT):
                for i, head in enumerate(group.heads):
                    order = sorted(slot for slot in slots[row, i].tolist() if slot >= first)
                    for place, slot in enumerate(slots[row, i].tolist()):
                        if slot < first:
                            continue
                        by = ENDS[-1] - len(order) + order.index(slot) - slot
                        moved += by != 0
                        wanted = rotation(by, keys.shape[-1], turning) @ came[layer][row, head, slot]
                        torch.testing.assert_close(keys[row, i, place].double(), wanted, atol=1e-6, rtol=1e-6)
    return moved


@pytest.mark.parametrize("policy", POLICIES, ids=lambda own: type(own).__name__)
def test_keys_stand_together(policy: Policy) -> None:
    """In a padded batch, after a prompt, single tokens and a second turn."""
    _check(policy, "llama", 8)


@pytest.mark.parametrize(("family", "turning"), [("gpt_neox", 2), ("phi3", 8)])
def test_of_every_rotation(family: str, turning: int) -> None:
    _check(H2O(budget_tokens=9, **MOVED), family, turning)


def _check(policy: Policy, family: str, turning: int) -> None:
    model = tiny(family).double()
    tokens, padding = batch()
    made: list[Any] = []
    own: Any = policy

    class Kept:
        def make_cache(self, model: Any) -> Any:
            made.append(own.make_cache(model))
            return made[0]

    kept: Any = Kept()
    steps, _, _ = watched(model, kept, tokens, padding, ENDS)
    # KVzip feeds its context again: those keys come after the context's.
    came = {}
    for layer, found in steps.items():
        again = found[1].keys.shape[2] if isinstance(policy, KVzip) else 0
        came[layer] = torch.cat([step.keys for step in found], 2)
        if again:
            came[layer] = torch.cat([came[layer][:, :, : ENDS[0]], came[layer][:, :, ENDS[0] + again :]], 2)
    assert _stand_together(made[0], came, turning) > 10
    release(model)


class Chosen(Policy):
    """Keeps these slots and the latest."""

    def score(self, view: Any) -> Tensor:
        chosen = torch.tensor([3, 5, 11, 12])
        return torch.where(torch.isin(view.slots, chosen), 1000, view.slots).double()


@pytest.mark.parametrize("when", ["prefill", "both"])
def test_as_a_dense_model_that_never_saw_the_rest(when: str) -> None:
    """One layer's keys know nothing of other tokens, so that a dense model is simply not given those that left; its
    own positions count what it was given."""
    model, tokens = tiny("llama", num_hidden_layers=1).double(), prompt(2, 40)
    cache = Chosen(budget_tokens=10, when=when, positions="cache").make_cache(model)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        given = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
        for i, own in enumerate(given):
            # Before a token 10 stay, or 10 and what came after the prompt.
            latest = range(14 + (i if when == "both" else 0), 20 + i)
            kept = [*[3, 5, 11, 12], *latest, 20 + i]
            wanted = model(tokens[:, kept], use_cache=False).logits[:, -1:]
            torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-6)
    release(model)


def test_half_precision_does_not_add_up() -> None:
    """Turned again at every token, keys are still the ones that came, turned once."""
    model, tokens = tiny("llama", num_hidden_layers=1).to(torch.bfloat16), prompt(1, 80)
    cache = Chosen(budget_tokens=12, positions="cache").make_cache(model)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        came = cache.layers[0].store.groups[0]
        first = came.view("came")[0, 0, came.slots()[0, 0].tolist().index(3)].double()
        for i in range(20, 80):
            model(tokens[:, i : i + 1], past_key_values=cache)
    group = cache.layers[0].store.groups[0]
    at = group.slots()[0, 0].tolist().index(3)
    angles = (80 - 12 - 3) * model.model.rotary_emb.inv_freq.double()
    left, right = first.chunk(2)
    wanted = torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()])
    torch.testing.assert_close(group.view("keys")[0, 0, at].double(), wanted, atol=2**-8, rtol=2**-8)


def test_rules_that_turn_keys_back() -> None:
    """At a second pass they know where keys stand: what is scored is what was scored before."""
    model, tokens = tiny("llama").double(), prompt(1, 30)
    found = []
    for positions in ("text", "cache"):
        scores: list[Tensor] = []

        class Watched(Leverage):
            def score(self, view: Any, kept: Any = scores) -> Tensor:
                own = super().score(view)
                kept.append(own.gather(-1, view.slots.argsort(-1)))
                return own

        policy = Watched(budget_tokens=12, when="passes", positions=positions, sketch_dimension=4)
        cache = policy.make_cache(tiny("llama", num_hidden_layers=1).double())
        model = cache._model()
        assert model is not None
        with torch.no_grad():
            model(tokens[:, :20], past_key_values=cache)
            model(tokens[:, 20:], past_key_values=cache)
        found.append(scores)
    assert len(found[0]) == 2
    torch.testing.assert_close(found[0], found[1])


def test_with_codes() -> None:
    """A prompt's entries are moved before they are coded."""
    model, tokens = tiny("llama"), prompt(1, 30)
    given = []
    for storage in (None, Quantised(bits=8, residual=4)):
        cache = KeyNorm(budget_tokens=12, when="prefill", storage=storage, **MOVED).make_cache(model)
        with torch.no_grad():
            model(tokens[:, :29], past_key_values=cache)
            given.append(model(tokens[:, 29:], past_key_values=cache).logits)
    torch.testing.assert_close(given[1], given[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("make", "match"), [
    (lambda: SnapKV(positions="here"), "SnapKV: positions is 'cache' or 'text'; got 'here'"),
    (lambda: LoCoCo(**MOVED), "LoCoCo fuses tokens"),
    (lambda: Razor(retrieval=[(0, 0)], **MOVED), "Razor fuses tokens"),
    (lambda: TidalDecode(**MOVED), "positions='cache' has no meaning"),
    (lambda: H2O(budget_tokens=9, storage=Quantised(), **MOVED), "turns keys again and again"),
    (lambda: Composed(SnapKV(budget_tokens=40, **MOVED), TOVA(budget_tokens=9, when="decode", storage=Quantised())),
     "TOVA would move keys again and again"),
    (lambda: Composed(StreamingLLM(budget_tokens=9), H2O(budget_tokens=9, **MOVED)), "both turn keys"),
    (lambda: H2O(budget_tokens=9, **MOVED).make_cache(tiny("gpt2")), "no rotary positions.*positions='text'"),
])  # fmt: skip
def test_what_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_keys_are_kvpress() -> None:
    """Its keys turn from 0 on, ours up to the next token: as many positions apart as tokens left."""
    stored = json.loads((Path(__file__).parent / "kvpress_turned.json").read_text())
    assert stored["kvpress"] == "0.5.5"
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).double().eval()
    model.load_state_dict(formula_weights({name: tuple(own.shape) for name, own in model.named_parameters()}))
    along = numbers((SETTINGS["head_dim"],), 5)
    for case in stored["cases"]:
        policy = SnapKV(compression_ratio=case["ratio"], window_size=case["window_size"], **MOVED)
        cache = policy.make_cache(model)
        with torch.no_grad():
            model(inputs_embeds=formula_prompt(), past_key_values=cache)
        for layer, wanted in zip(cache.layers, case["keys"], strict=True):
            group = layer.store.groups[0]
            back = rotation(group.length - PROMPT, SETTINGS["head_dim"], SETTINGS["head_dim"])
            order = group.slots()[0].argsort(-1)[..., None].expand_as(group.view("keys")[0])
            keys = group.view("keys")[0].gather(1, order) @ back.T
            torch.testing.assert_close((keys @ along).tolist(), wanted, atol=1e-5, rtol=1e-5)
    assert len(stored["cases"]) == 2
