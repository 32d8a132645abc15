"""Razor and LoCoCo: what is kept, what it is merged into and what attention makes of it, as loops in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import feed, held
from test_full import MODES, generate, repeating, same, turns
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

from manyheads.hosts.attend import Scoring
from manyheads.hosts.loading import load_model
from manyheads.shrink import H2O, AdaKV, ExpectedAttention, LoCoCo, Policy, Razor, StreamingLLM, fit_lococo, release
from manyheads.shrink.layer import RaggedLayer

ENDS = [14, 15, 16, 17, 20, 21, 22, 23]
LEFT = [0, 4]
RETRIEVAL = [(0, 1), (2, 0)]


@dataclass
class Seen:
    """One pass of one layer: what came in, what came out, [b, heads, n, d], and what was held after it."""

    keys: Tensor
    values: Tensor
    queries: Tensor = field(default_factory=lambda: torch.empty(0))
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    scoring: Scoring = field(default_factory=lambda: Scoring(1.0))
    window: int | None = None
    after: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor, float]]] = field(default_factory=dict)


def contents(layer: RaggedLayer, note: str) -> dict[tuple[int, int], dict[int, tuple[Tensor, Tensor, float]]]:
    """(row, KV head) -> slot -> key, value and a note."""
    found: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor, float]]] = {}
    for group in layer.store.groups:
        slots = group.slots().expand(group.rows["keys"].shape[0], len(group.heads), -1)
        rows = [group.view(name).clone() for name in ("keys", "values", note)]
        for row in range(slots.shape[0]):
            for at, head in enumerate(group.heads):
                own = {int(slots[row, at, i]): i for i in range(group.length) if slots[row, at, i] >= LEFT[row]}
                found[row, head] = {
                    slot: (rows[0][row, at, i], rows[1][row, at, i], float(rows[2][row, at, i]))
                    for slot, i in own.items()
                }
    return found


@contextmanager
def watching(note: str) -> Iterator[dict[int, list[Seen]]]:
    steps: dict[int, list[Seen]] = {}
    update, attend = RaggedLayer.update, RaggedLayer.attend

    def watched_update(self: RaggedLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.setdefault(self.index, []).append(Seen(keys.clone(), values.clone()))
        return update(self, keys, values, *args, **kwargs)

    def watched_attend(self: RaggedLayer, query: Tensor, scoring: Any, seen: Any) -> Tensor:
        out = attend(self, query, scoring, seen)
        step = steps[self.index][-1]
        step.queries, step.out = query.clone(), out.transpose(1, 2).clone()
        step.scoring, step.window = scoring, self.window
        step.after = contents(self, note)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaggedLayer, "update", watched_update)
        patch.setattr(RaggedLayer, "attend", watched_attend)
        yield steps


def run(policy: Policy, note: str, family: str = "llama") -> dict[int, list[Seen]]:
    """A padded batch of two rows: a prompt, single tokens, a chunk, single tokens."""
    # The experts of gpt_oss know no float64.
    model = tiny(family) if family == "gpt_oss" else tiny(family).double()
    tokens = torch.stack([torch.randperm(50)[: ENDS[-1]] + 3 for _ in range(2)])
    padding = torch.ones(2, ENDS[-1], dtype=torch.long)
    padding[1, : LEFT[1]] = 0
    with watching(note) as steps:
        feed(model, policy.make_cache(model), tokens, padding, ENDS)
    return steps


def attention(query: Tensor, entries: list[tuple[Tensor, Tensor, int]], scoring: Scoring, head: int = 0) -> Tensor:
    """Softmax over entries that each stand for so many tokens: written out as that many tokens."""
    # Numbers of Python's own: a tensor's take thirty times as long one by one.
    many = [(key.tolist(), value.tolist()) for key, value, count in entries for _ in range(count)]
    asked = query.tolist()
    scores = [sum(a * b for a, b in zip(asked, key, strict=True)) * scoring.scale for key, _ in many]
    if scoring.softcap is not None:
        scores = [scoring.softcap * math.tanh(score / scoring.softcap) for score in scores]
    shares = [math.exp(score) for score in scores]
    total = sum(shares) + (0.0 if scoring.sinks is None else math.exp(float(scoring.sinks[head].detach())))
    mixed = [sum(share * own for share, own in zip(shares, column, strict=True)) / total
             for column in zip(*(value for _, value in many), strict=True)]  # fmt: skip
    return torch.tensor(mixed, dtype=query.dtype)


def check_razor(policy: Razor, limit: Callable[[int, int, int], int], family: str = "llama") -> None:
    """limit(layer, head, real tokens): entries of that head. Rows and heads are simulated one by one."""
    summaries = 0
    for layer, steps in run(policy, "bias", family).items():
        if steps[0].window is not None:
            # Behind a window there is nothing to summarise.
            assert not any(entry[2] for step in steps for own in step.after.values() for entry in own.values())
            continue
        for row, head in steps[0].after:
            keys, values = (torch.cat([getattr(s, name)[row, head] for s in steps], 0) for name in ("keys", "values"))
            alone: list[int] = []
            gone: list[int] = []
            total, place = 0, -1
            for step in steps:
                count = step.keys.shape[2]
                entries = [(keys[gone].mean(0), values[gone].mean(0), len(gone))] if gone else []
                entries += [(keys[slot], values[slot], 1) for slot in alone]
                new = range(max(total, LEFT[row]), total + count)
                for slot in new:
                    entries.append((keys[slot], values[slot], 1))
                    for repeat in range(2):
                        query = step.queries[row, 2 * head + repeat, slot - total]
                        wanted = attention(query, entries, step.scoring, 2 * head + repeat)
                        torch.testing.assert_close(step.out[row, 2 * head + repeat, slot - total], wanted)
                alone, total = alone + list(new), total + count
                # Sinks, one summary, the latest: whatever else there is joins the summary.
                least = limit(layer, head, total - LEFT[row])
                while len(alone) + bool(gone) > least:
                    gone.append(alone.pop(policy.sink_size))
                    if len(gone) == 1:
                        gone.append(alone.pop(policy.sink_size))
                place = gone[-1] if gone and place < 0 else place
                given = step.after[row, head]
                assert sorted(given) == sorted(alone + [place] * bool(gone)), (layer, row, head)
                if gone:
                    summaries += 1
                    key, value, bias = given[place]
                    torch.testing.assert_close(key, keys[gone].mean(0))
                    torch.testing.assert_close(value, values[gone].mean(0))
                    assert bias == pytest.approx(math.log(len(gone)), rel=1e-6)
    assert summaries > 12


def elsewhere(short: Callable[[int], int]) -> Callable[[int, int, int], int]:
    return lambda layer, head, count: 10**6 if (layer, head) in RETRIEVAL else short(count)


def test_razor_keeps_sinks_recent_tokens_and_one_summary() -> None:
    check_razor(
        Razor(retrieval=RETRIEVAL, sink_size=2, recent_floor=3, compression=100), elsewhere(lambda count: 2 + 3 + 1)
    )
    check_razor(
        Razor(retrieval=RETRIEVAL, sink_size=1, recent_floor=2, compression=3),
        elsewhere(lambda count: 1 + max(2, count // 3) + 1),
    )


def test_razor_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.LEFT", [0, 0])
    policy = Razor(retrieval=RETRIEVAL, sink_size=2, recent_floor=3, compression=100)
    check_razor(policy, elsewhere(lambda count: 6))


def test_a_rule_sees_the_weights_of_summaries() -> None:
    """What a policy is told of attention is what attention did."""
    seen: list[tuple[list[int], Tensor]] = []

    class Watching(Razor):
        def observe(self, view: Any) -> None:
            ((block, _),) = view.weights(last=1)
            seen.append((view.group.heads, block[:, :, :, 0] @ view.values))

    steps = run(Watching(retrieval=[], sink_size=2, recent_floor=3, compression=100), "bias")
    # One group of heads in every layer, asked layer by layer, pass by pass.
    for turn in range(len(ENDS)):
        for layer, own in steps.items():
            heads, wanted = seen[turn * len(steps) + layer]
            assert heads == [0, 1]
            torch.testing.assert_close(own[turn].out[:, :, -1], wanted.flatten(1, 2))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_razor_with_soft_caps_sinks_and_windows(family: str) -> None:
    policy = Razor(retrieval=[], sink_size=1, recent_floor=2, compression=100)
    check_razor(policy, lambda layer, head, count: 4, family)


def test_razor_from_a_ratio_and_from_a_budget() -> None:
    # 6 KV heads, 2 keep everything: a third of the cache is theirs, so half of it leaves the others a quarter.
    check_razor(
        Razor(retrieval=RETRIEVAL, sink_size=1, compression_ratio=0.5), elsewhere(lambda count: max(3, count // 4))
    )
    # 9 on average; the others keep 2 + 3 + 1, and the two retrieval heads summarise too: (9 * 6 - 6 * 4) / 2.
    policy = Razor(retrieval=RETRIEVAL, sink_size=2, recent_floor=3, budget_tokens=9)
    check_razor(policy, lambda layer, head, count: 15 if (layer, head) in RETRIEVAL else 6)


def test_razor_finds_its_heads_in_a_profile() -> None:
    echo = [[0.1, 0.2, 0.0, 0.3], [0.4, 0.0, 0.1, 0.2], [0.0, 0.9, 0.1, 0.1]]
    induction = [[0.9, 0.0, 0.1, 0.2], [0.0, 0.1, 0.0, 0.8], [0.1, 0.1, 0.2, 0.0]]
    policy = Razor(echo=echo, induction=induction, echo_share=1 / 6, induction_share=2 / 6)
    # Query heads 2g and 2g + 1 read KV head g: echo's best is (2, 0), induction's are (0, 0) and (1, 1).
    assert policy.heads(3, 2).tolist() == [[True, False], [False, True], [True, False]]
    own = Razor(echo=[[0.1, 0.3], [0.4, 0.2], [0.9, 0.1]], echo_share=0.2)
    assert own.heads(3, 2).tolist() == [[False, False], [True, False], [True, False]]
    with pytest.raises(ValueError, match=r"\(3, 4\).*5 layers of 2"):
        policy.heads(5, 2)
    with pytest.raises(ValueError, match="a profile of this model"):
        policy.heads(3, 3)


def test_a_summary_in_half_precision_forgets_nothing() -> None:
    """A running mean kept in bfloat16 would stop moving after some hundred tokens."""
    model = tiny("llama", max_position_embeddings=1024, num_hidden_layers=1).bfloat16()
    policy = Razor(retrieval=[], sink_size=1, recent_floor=2, compression=1000)
    tokens, padding = prompt(1, 620), torch.ones(1, 620, dtype=torch.long)
    with watching("bias") as steps:
        feed(model, policy.make_cache(model), tokens, padding, [20, *range(21, 620, 6), 620])
    keys = torch.cat([step.keys[0, 1] for step in steps[0]]).double()
    ((key, _, bias),) = [entry for entry in steps[0][-1].after[0, 1].values() if entry[2]]
    torch.testing.assert_close(key.double(), keys[1:618].mean(0), atol=2e-3, rtol=4e-3)
    assert bias == pytest.approx(math.log(617), rel=1e-6)


@pytest.mark.parametrize("policy", [
    Razor(retrieval=[], recent_floor=64),
    Razor(retrieval=[(i, j) for i in range(3) for j in range(4)], recent_floor=1, sink_size=1),
    LoCoCo(budget_tokens=64, mem_compress=4, recent_size=4),
], ids=["razor", "razor-all", "lococo"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_budget_that_covers_everything(family: str, policy: Policy) -> None:
    model = tiny(family, num_key_value_heads=4)
    tokens, padding = prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    padding[1, :6] = 0
    wanted = turns(model, tokens, padding, DynamicCache(config=model.config))
    torch.testing.assert_close(turns(model, tokens, padding, policy.make_cache(model)), wanted, atol=1e-5, rtol=1e-5)
    release(model)
    for mode in ("beams", "lookup"):
        one = repeating(1, 12)
        wanted_text = generate(model, one, **MODES[mode])
        same(generate(model, one, past_key_values=policy.make_cache(model), **MODES[mode]), wanted_text)
        release(model)


def weights(
    seed: int = 1, normalizer: float = 0.4, slots: int = 3, width: int = 16, kernel: int = 5
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(3):
        found[f"layers.{i}.weight"] = torch.randn(slots, width, kernel, generator=generator)
        found[f"layers.{i}.bias"] = torch.randn(slots, generator=generator)
        found[f"layers.{i}.normalizer"] = torch.full((1,), normalizer)
    return found


@pytest.mark.parametrize("policy", [
    Razor(retrieval=RETRIEVAL, sink_size=2, recent_floor=3, compression=100),
    LoCoCo(budget_tokens=8, mem_compress=3, recent_size=2, weights=weights()),
], ids=["razor", "lococo"])  # fmt: skip
def test_beams_carry_what_was_merged(policy: Policy) -> None:
    """Rows that change places, or become two, go on as if each had been alone."""
    model = tiny("llama").double()
    tokens, more = prompt(2, 16), prompt(1, 3, seed=5)
    cache = policy.make_cache(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        given = [model(more[:, i : i + 1].expand(2, -1), past_key_values=cache).logits[:, 0] for i in range(3)]
        cache = policy.make_cache(model)
        model(tokens[1:], past_key_values=cache)
        wanted = [model(more[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(3)]
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two.expand(2, -1))


@pytest.mark.parametrize("policy", [
    Razor(retrieval=RETRIEVAL, sink_size=2, recent_floor=3, compression=100),
    LoCoCo(budget_tokens=8, mem_compress=3, recent_size=2, weights=weights()),
    ExpectedAttention(interval=1, budget_tokens=8, sink_size=2),
], ids=["razor", "lococo", "expected"])  # fmt: skip
def test_tokens_taken_back_are_in_no_mean(policy: Policy) -> None:
    """Tokens on trial are merged when they are there to stay: as if those taken back had never been fed."""
    model = tiny("llama").double()
    tokens, more = prompt(2, 16), prompt(2, 3, seed=5)

    def go_on(trial: int) -> Tensor:
        cache = policy.make_cache(model)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            cache.activate_past_recording()
            model(more[:, :trial], past_key_values=cache)
            cache.crop(-(trial - 2))
            return model(more[:, :1], past_key_values=cache).logits

    torch.testing.assert_close(go_on(3), go_on(2))


def test_merging_leaves_the_models_own_tensors_alone() -> None:
    """A first pass is held in the model's tensors, which autograd still needs."""
    model = tiny("llama")
    cache = Razor(retrieval=[], sink_size=1, recent_floor=2, compression=100).make_cache(model)
    loss = model(prompt(1, 12), past_key_values=cache).logits.square().mean()
    loss.backward()
    given = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    release(model)
    model.zero_grad()
    model(prompt(1, 12), use_cache=False).logits.square().mean().backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


# LoCoCo


def fused(own: list[Tensor], keys: list[Tensor], values: list[Tensor], base: list[int]) -> list[list[float]]:
    """Rows of W over a sequence, of which the places `base` are the one-hot ones."""
    kernel, bias, normalizer = (part.tolist() for part in own)
    width, taps, n = len(kernel[0]), len(kernel[0][0]), normalizer[0]
    lines = [key.tolist() + value.tolist() for key, value in zip(keys, values, strict=True)]
    rows = []
    for slot in range(len(base)):
        logits = []
        for at in range(len(lines)):
            total = bias[slot]
            for tap in range(taps):
                there = at + tap - taps // 2
                if 0 <= there < len(lines):
                    total += sum(kernel[slot][i][tap] * lines[there][i] for i in range(width))
            logits.append(total)
        top = max(logits)
        soft = [math.exp(value - top) for value in logits]
        rows.append([n * own / sum(soft) + (1 - n) * (1.0 if at == base[slot] else 0.0) for at, own in enumerate(soft)])
    return rows


@pytest.mark.parametrize("normalizer", [0.4, 1.0])
def test_lococo_fuses_what_heavy_hitters_leave(normalizer: float) -> None:
    learned = weights(normalizer=normalizer)
    policy = LoCoCo(budget_tokens=7, mem_compress=3, recent_size=2, weights=learned)
    merged = 0
    for layer, steps in run(policy, "mass").items():
        own = [learned[f"layers.{layer}.{name}"].double() for name in ("weight", "bias", "normalizer")]
        for row, head in steps[0].after:
            entries: dict[int, list[Any]] = {}
            total = 0
            for step in steps:
                count = step.keys.shape[2]
                for slot in range(max(total, LEFT[row]), total + count):
                    at = slot - total
                    entries[slot] = [step.keys[row, head, at], step.values[row, head, at], 0.0]
                for slot in range(max(total, LEFT[row]), total + count):
                    visible = [other for other in entries if other <= slot]
                    for repeat in range(2):
                        query = step.queries[row, 2 * head + repeat, slot - total]
                        scores = {other: float(query @ entries[other][0]) * step.scoring.scale for other in visible}
                        top = max(scores.values())
                        sums = sum(math.exp(score - top) for score in scores.values())
                        for other in visible:
                            entries[other][2] += math.exp(scores[other] - top) / sums
                        wanted = sum(math.exp(scores[o] - top) / sums * entries[o][1] for o in visible)
                        torch.testing.assert_close(step.out[row, 2 * head + repeat, slot - total], wanted)
                total += count
                if len(entries) > 7:
                    merged += 1
                    free = [slot for slot in entries if slot < total - 2]
                    ranked = sorted(free, key=lambda slot: -entries[slot][2])
                    heavy, base, rest = ranked[: 7 - 2 - 3], sorted(ranked[2:5]), sorted(ranked[2:])
                    assert len(heavy) == 2
                    line = [entries[slot] for slot in rest]
                    rows = fused(own, [e[0] for e in line], [e[1] for e in line], [rest.index(slot) for slot in base])
                    new = {
                        slot: [sum(w * e[part] for w, e in zip(mix, line, strict=True)) for part in range(3)]
                        for slot, mix in zip(base, rows, strict=True)
                    }
                    entries = {slot: entry for slot, entry in entries.items() if slot not in rest} | new
                given = step.after[row, head]
                assert sorted(given) == sorted(entries), (layer, row, head)
                for slot, (key, value, mass) in given.items():
                    torch.testing.assert_close(key, entries[slot][0], atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(value, entries[slot][1], atol=1e-5, rtol=1e-5)
                    assert mass == pytest.approx(entries[slot][2], abs=1e-4)
                    entries[slot][:2] = [key, value]
    assert merged > 20


def test_lococo_untrained_is_heavy_hitter_eviction() -> None:
    model = tiny("llama")
    tokens, padding = prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    padding[1, :6] = 0
    wanted = turns(model, tokens, padding, H2O(budget_tokens=8, recent_size=2).make_cache(model))
    for learned in (None, weights(normalizer=0.0)):
        cache = LoCoCo(budget_tokens=8, mem_compress=3, recent_size=2, weights=learned).make_cache(model)
        torch.testing.assert_close(turns(model, tokens, padding, cache), wanted, atol=0, rtol=0)


def test_lococo_with_shares_of_ada_kv() -> None:
    """Heads of different budgets: all of a small head's entries but the recent may be fused ones."""
    model = tiny("llama")
    policy = LoCoCo(budget_tokens=7, mem_compress=3, recent_size=2, weights=weights(), allocation=AdaKV(floor=0.3))
    cache = policy.make_cache(model)
    feed(model, cache, prompt(1, 24), torch.ones(1, 24, dtype=torch.long), [20, 21, 22, 23, 24])
    assert all(sum(own) <= 14 for own in cache.lengths())
    for layer in cache.layers:
        for (_, head), slots in held(layer).items():
            assert slots[-1] == 23, head


def passkeys(count: int, length: int, seed: int = 3) -> Tensor:
    """[count, length] bytes: a line with a pass key in a module of the standard library, and the question."""
    filler, rows = Path(random.__file__).read_bytes(), []
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        key = "".join(str(int(torch.randint(10, (1,), generator=generator))) for _ in range(5))
        line = f"\nThe pass key is {key}. Remember it.\n".encode()
        ask = f"\nWhat is the pass key? The pass key is {key}".encode()
        room = length - len(line) - len(ask)
        start, depth = 3000 * (i + 1), (i + 1) * room // (count + 1)
        text = filler[start : start + depth] + line + filler[start + depth : start + room] + ask
        rows.append(list(text))
    return torch.tensor(rows)


def test_razor_on_the_packaged_model() -> None:
    """With the two retrieval heads whole it answers; the same heads cut as the others are, it does not."""
    model, ids = load_model().model, passkeys(2, 700)

    def right(policy: Policy) -> int:
        with policy(model):
            out = model.generate(ids[:, :-5], max_new_tokens=5, do_sample=False, pad_token_id=0)
        return int((out[:, -5:] == ids[:, -5:]).all(1).sum())

    assert right(Razor(retrieval=[(1, 0), (1, 1)], recent_floor=48, compression=100)) == 2
    assert right(Razor(retrieval=[(2, 0), (3, 1)], recent_floor=48, compression=100)) == 0


@lru_cache(maxsize=2)
@torch.no_grad()
def expectations(model: Any, ids: Tensor) -> Tensor:
    """Of the full model, for as long as the same texts are asked of."""
    return model(ids, use_cache=False).logits.log_softmax(-1)


def divergence(model: Any, policy: Policy, ids: Tensor, prefix: int) -> float:
    """KL from the full model of what follows a prefix that was compressed."""
    wanted = expectations(model, ids)[:, prefix:]
    with torch.no_grad(), policy(model) as active:
        model(ids[:, :prefix], use_cache=True)
        given = model(ids[:, prefix:], past_key_values=active.cache).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def test_a_summary_is_better_than_nothing() -> None:
    model, ids = load_model().model, passkeys(3, 500)
    with_summary = divergence(model, Razor(retrieval=[], recent_floor=24, compression=100), ids, 400)
    without = divergence(model, StreamingLLM(budget_tokens=29, positions="text", when="prefill"), ids, 400)
    assert with_summary < without


def test_fitted_lococo_is_better_than_eviction(tmp_path: Path) -> None:
    """On texts with other pass keys than it was fitted on, those that it was chosen by and those that it never saw."""
    model, ids, unseen, losses = load_model().model, passkeys(4, 260), passkeys(4, 260, seed=8), []
    held_out = passkeys(2, 260, seed=5)
    common = {"budget_tokens": 32, "mem_compress": 16, "recent_size": 8, "when": "prefill"}
    policy = LoCoCo(**common)
    before = [part.detach().clone() for part in model.parameters()]
    fitted = fit_lococo(
        model, ids, policy, prefix=200, held_out=held_out, epochs=8, kernel_size=5, rate=0.1,
        report=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    torch.testing.assert_close([part.detach() for part in model.parameters()], before, atol=0, rtol=0)
    # The trainer's own path is the cache's: its first loss is plain eviction's, its least the fitted policy's.
    assert losses[0] == pytest.approx(divergence(model, policy, held_out, 200), rel=1e-3)
    assert min(losses) == pytest.approx(divergence(model, fitted, held_out, 200), rel=1e-3)
    assert min(losses) < 0.95 * losses[0]
    better = divergence(model, fitted, unseen, 200)
    assert better < 0.95 * divergence(model, policy, unseen, 200)
    fitted.save(tmp_path / "lococo.safetensors")
    again = LoCoCo(**common, weights=tmp_path / "lococo.safetensors")
    assert divergence(model, again, unseen, 200) == better


def test_lococo_is_chosen_by_text_that_it_did_not_learn() -> None:
    """Where fusing helps the fitted rows alone, plain eviction comes back, and the fit stops early."""
    model, ids, losses = load_model().model, passkeys(1, 260), []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(32, 127, (2, 260), generator=generator)
    policy = LoCoCo(budget_tokens=32, mem_compress=16, recent_size=8, when="prefill")
    fitted = fit_lococo(
        model, ids, policy, prefix=200, held_out=noise, epochs=40, patience=2, kernel_size=5, rate=0.3,
        report=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    at = losses.index(min(losses))
    assert len(losses) == at + 3
    assert divergence(model, fitted, noise, 200) == pytest.approx(losses[at], rel=1e-3)
    assert divergence(model, fitted, noise, 200) <= divergence(model, policy, noise, 200) * (1 + 1e-3)


def test_lococo_sets_rows_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the rows, that no gradient comes from."""
    from manyheads.shrink.policies import lococo

    model, seen, learned = tiny("llama"), [], []
    real, loss = lococo._sample, lococo._loss
    monkeypatch.setattr(lococo, "_sample", lambda m, rows, prefix: (seen.append(rows), real(m, rows, prefix))[1])

    def watched(model: Any, sample: Any, *rest: Any) -> Tensor:
        if torch.is_grad_enabled():
            learned.append(sample.more)
        return loss(model, sample, *rest)

    monkeypatch.setattr(lococo, "_loss", watched)
    ids = prompt(8, 20)
    policy = LoCoCo(budget_tokens=9, mem_compress=3, recent_size=2)
    fit_lococo(model, ids, policy, prefix=12, epochs=2, batch=8, kernel_size=3)
    torch.testing.assert_close(seen, [ids[:6], ids[6:]])
    assert learned
    torch.testing.assert_close(learned, [ids[:6, 12:]] * len(learned))
    with pytest.raises(ValueError, match="leaves none to choose by"):
        fit_lococo(model, ids[:1], policy, prefix=12)


def test_what_razor_refuses() -> None:
    good = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    for match, given in {
        "heads once": {},
        "once, as": {"echo": good, "retrieval": [(0, 0)]},
        "rows of one length": {"echo": [[0.1], [0.2, 0.3]]},
        "not finite": {"induction": [[math.nan, 0.1]]},
        "different shapes": {"echo": good, "induction": good[:2]},
        "echo_share": {"echo": good, "echo_share": 2},
        "sink_size": {"retrieval": [], "sink_size": -1},
        "recent_floor": {"retrieval": [], "recent_floor": 1.5},
        "compression is": {"retrieval": [], "compression": 0},
        "leave allocation out": {"retrieval": [], "allocation": AdaKV()},
        "no byte budget": {"retrieval": [], "budget_bytes": 10**6},
        "below the 6": {"retrieval": [], "budget_tokens": 5},
    }.items():
        with pytest.raises(ValueError, match=match):
            Razor(**given)
    model = tiny("llama")
    for match, policy in {
        "layer 7, KV head 0": Razor(retrieval=[(7, 0)]),
        "a profile of this model": Razor(echo=good[:2]),
        "keep more than that": Razor(retrieval=RETRIEVAL, compression_ratio=0.7),
    }.items():
        with pytest.raises(ValueError, match=match):
            model(prompt(1, 12), past_key_values=policy.make_cache(model))


def test_what_lococo_refuses(tmp_path: Path) -> None:
    def lococo(**given: Any) -> LoCoCo:
        return LoCoCo(**{"budget_tokens": 9, "mem_compress": 3, "recent_size": 2, **given})

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{not it}")
    nan = {**weights(), "layers.1.bias": torch.full((3,), math.nan)}
    for match, given in {
        "mem_compress": {"mem_compress": 0},
        "recent_size": {"recent_size": -1},
        "below the 5": {"budget_tokens": 4},
        "cannot be read|can be read": {"weights": broken},
        "can be read": {"weights": tmp_path / "none.safetensors"},
        "no LoCoCo weights": {"weights": {"layers.0.weight": torch.zeros(1)}},
        "layer 1 is damaged": {"weights": nan},
        "fuses into 4": {"weights": weights(slots=4)},
    }.items():
        with pytest.raises(ValueError, match=match):
            lococo(**given)
    with pytest.raises(ValueError, match="no weights to save"):
        lococo().save(tmp_path / "x")
    model = tiny("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="for 3 layers"):
        lococo(weights=weights()).make_cache(model)
    model = tiny("llama")
    with pytest.raises(ValueError, match="of 10 numbers together"):
        model(prompt(1, 12), past_key_values=lococo(weights=weights(width=10)).make_cache(model))
    release(model)
    for match, own, given in (
        ("sliding windows", tiny("mistral"), {"prefix": 10}),
        ("prefix=30", model, {"prefix": 30}),
        ("budget_tokens from 5", model, {"prefix": 8}),
        ("must be odd", model, {"prefix": 10, "kernel_size": 4}),
    ):
        with pytest.raises(ValueError, match=match):
            fit_lococo(own, prompt(2, 20), lococo(), **given)
