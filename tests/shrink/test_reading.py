"""Policies that keep everything and read a part: their rules as loops in float64, and what follows from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import feed
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from manyheads.hosts.families import rotations
from manyheads.hosts.loading import load_model
from manyheads.shrink import LongHeads, Policy, TidalDecode, release
from manyheads.shrink.layer import RaggedLayer
from manyheads.shrink.quantised import Quantised

ENDS = [14, 15, 16, 19, 20, 21]
LEFT = [0, 4]
FULL5 = ["full_attention"] * 5


@dataclass
class Step:
    """One pass through one layer, all heads: queries [b, h, n, d] and the output [b, n, h, dv]."""

    queries: Tensor
    out: Tensor
    scoring: Any
    read: int | None


@dataclass
class Tape:
    keys: list[Tensor]
    values: list[Tensor]
    steps: list[Step]

    def key(self, row: int, head: int) -> Tensor:
        return torch.cat([part[row, head] for part in self.keys]).double()

    def value(self, row: int, head: int) -> Tensor:
        return torch.cat([part[row, head] for part in self.values]).double()

    def query(self, row: int, head: int) -> Tensor:
        return torch.cat([step.queries[row, head] for step in self.steps]).double()

    def output(self, row: int, head: int) -> Tensor:
        return torch.cat([step.out[row, :, head] for step in self.steps]).double()


@contextmanager
def taping() -> Iterator[dict[int, Tape]]:
    tapes: dict[int, Tape] = {}
    update, attend = RaggedLayer.update, RaggedLayer.attend

    def watched_update(self: RaggedLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        tape = tapes.setdefault(self.index, Tape([], [], []))
        tape.keys.append(keys.clone())
        tape.values.append(values.clone())
        return update(self, keys, values, *args, **kwargs)

    def watched_attend(self: RaggedLayer, query: Tensor, scoring: Any, seen: Any) -> Tensor:
        out = attend(self, query, scoring, seen)
        tapes[self.index].steps.append(Step(query.clone(), out.clone(), scoring, self.read))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaggedLayer, "update", watched_update)
        patch.setattr(RaggedLayer, "attend", watched_attend)
        yield tapes


def padded(rows: int, length: int, left: list[int] = LEFT) -> tuple[Tensor, Tensor]:
    padding = torch.ones(rows, length, dtype=torch.long)
    for row, count in enumerate(left[:rows]):
        padding[row, :count] = 0
    # No token twice: equal keys would tie.
    return torch.stack([torch.randperm(58)[:length] + 3 for _ in range(rows)]), padding


def exact(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model in float64, in which no two choices are close."""
    model = tiny(family, **changes).double()
    if family == "gpt_oss":
        model.set_experts_implementation("eager")
    return model


def logit(query: Tensor, key: Tensor, scoring: Any) -> float:
    score = float(sum(a * b for a, b in zip(query.tolist(), key.tolist(), strict=True))) * scoring.scale
    return score if scoring.softcap is None else scoring.softcap * math.tanh(score / scoring.softcap)


def mix(scores: list[float], values: list[Tensor], sink: float | None) -> Tensor:
    # Numbers of Python's own: a tensor's take thirty times as long one by one.
    every = scores if sink is None else [*scores, sink]
    top = max(every)
    shares = [math.exp(score - top) for score in every]
    columns = zip(*(value.tolist() for value in values), strict=True)
    mixed = [sum(a * b for a, b in zip(shares, column, strict=False)) / sum(shares) for column in columns]
    return torch.tensor(mixed, dtype=values[0].dtype)


def sink_of(scoring: Any, head: int) -> float | None:
    return None if scoring.sinks is None else float(scoring.sinks.detach()[head])


# TidalDecode


def tidal_oracle(
    tapes: dict[int, Tape], row: int, head: int, policy: TidalDecode, sparse: list[bool], windows: list[int | None]
) -> dict[int, list[Tensor]]:
    """Outputs by layer and slot, from each layer's own queries and keys."""
    chosen: dict[int, list[int]] = {}
    outputs: dict[int, list[Tensor]] = {}
    for layer, tape in sorted(tapes.items()):
        repeat = tape.steps[0].queries.shape[1] // tape.keys[0].shape[1]
        queries, keys, values = tape.query(row, head), tape.key(row, head // repeat), tape.value(row, head // repeat)
        scoring, outputs[layer] = tape.steps[0].scoring, []
        for slot in range(len(queries)):
            window = windows[layer]
            low = LEFT[row] if window is None else max(LEFT[row], slot - window + 1)
            scores = {at: logit(queries[slot], keys[at], scoring) for at in range(low, slot + 1)}
            if sparse[slot] and slot >= LEFT[row] and window is None:
                if layer in (policy.sparse_layer_start, policy.correction_layer):
                    chosen[slot] = sorted(scores, key=lambda at, own=scores: -own[at])[: policy.budget_tokens]
                elif layer > policy.sparse_layer_start:
                    scores = {at: scores[at] for at in chosen[slot]}
            # What padding would read is nobody's business.
            scores = scores or {slot: 0.0}
            mixed = mix(list(scores.values()), [values[at] for at in scores], sink_of(scoring, head))
            outputs[layer].append(mixed)
    return outputs


def check_tidal(model: PreTrainedModel, policy: TidalDecode, *, trial: bool = False) -> dict[int, Tape]:
    """Against the oracle; with trial, passes after the first are candidates that may be taken back."""
    tokens, padding = padded(2, ENDS[-1])
    cache = policy.make_cache(model)
    with taping() as tapes:
        feed(model, cache, tokens, padding, ENDS[:1])
        if trial:
            cache.activate_past_recording()
        positions = (padding.cumsum(1) - 1).clamp_min(0)
        for start, end in pairwise(ENDS):
            with torch.no_grad():
                model(
                    tokens[:, start:end],
                    attention_mask=padding[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                )
    sparse = [False] * ENDS[0]
    for start, end in pairwise(ENDS):
        sparse += [trial or end == start + 1] * (end - start)
    windows = [layer.window for layer in cache.layers]
    for row in range(2):
        for head in range(tapes[0].steps[0].queries.shape[1]):
            wanted = tidal_oracle(tapes, row, head, policy, sparse, windows)
            for layer, tape in tapes.items():
                given, own = tape.output(row, head)[LEFT[row] :], torch.stack(wanted[layer])[LEFT[row] :]
                torch.testing.assert_close(given, own, atol=1e-9, rtol=1e-9)
    return tapes


@pytest.mark.parametrize("trial", [False, True])
def test_tidal_llama(trial: bool) -> None:
    model = exact("llama", num_hidden_layers=5)
    tapes = check_tidal(model, TidalDecode(top_k=5, sparse_layer_start=1, correction_layer=3), trial=trial)
    assert [tapes[layer].steps[-1].read for layer in range(5)] == [None, None, 5, None, 5]
    assert tapes[2].steps[0].read is None
    assert tapes[2].steps[3].read == (5 if trial else None)


def test_tidal_caps_sinks_and_windows() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
    policy = TidalDecode(budget_tokens=5, sparse_layer_start=1)
    for family in ("gemma2", "gpt_oss"):
        check_tidal(exact(family, num_hidden_layers=5, layer_types=kinds), policy)


def test_query_heads_of_one_kv_head_read_their_own() -> None:
    """Where one query head of a pair changes, its partner's output stays."""
    policy = TidalDecode(top_k=4, sparse_layer_start=0)
    tokens, padding = padded(1, 20)

    def outputs(change: bool) -> Tensor:
        model = tiny("llama", num_hidden_layers=2)
        with torch.no_grad():
            # Layer 0 writes nothing, so that layer 1 differs by what it reads alone.
            model.model.layers[0].self_attn.o_proj.weight[:] = 0
            model.model.layers[0].self_attn.q_proj.weight[:8] *= -1 if change else 1
        with taping() as tapes:
            feed(model, policy.make_cache(model), tokens, padding, [19, 20])
        return tapes[1].steps[-1].out[0, 0]

    before, after = outputs(False), outputs(True)
    torch.testing.assert_close(after[1:], before[1:])
    assert float((after[0] - before[0]).abs().max()) > 1e-3


# LongHeads


def turned(vector: Tensor, by: int, angles: Tensor | None) -> Tensor:
    """RoPE in halves, pair by pair."""
    out, pairs = vector.tolist(), [] if angles is None else angles.tolist()
    for i, angle in enumerate(pairs):
        cos, sin, a, b = math.cos(by * angle), math.sin(by * angle), out[i], out[i + len(pairs)]
        out[i], out[i + len(pairs)] = a * cos - b * sin, b * cos + a * sin
    return torch.tensor(out, dtype=vector.dtype)


def represent(
    queries: list[Tensor], keys: Tensor, values: Tensor, chunk: int, size: int, scoring: Any, angles: Any
) -> Tensor:
    """One chunk's key, from the queries [text, d] of a KV head's query heads and its keys and values."""
    inside = range(chunk * size, (chunk + 1) * size)
    plain = type(scoring)(scoring.scale)
    local = {at: turned(keys[at], -chunk * size, angles) for at in inside}
    total = torch.zeros_like(values[0])
    for own in queries:
        for at in inside:
            query = turned(own[at], -chunk * size, angles)
            total += mix([logit(query, local[other], plain) for other in inside], [values[i] for i in inside], None)
    mean = total / (len(queries) * size)
    return mix([logit(mean, local[at], plain) for at in inside], [local[at] for at in inside], None)


def longheads_oracle(tape: Tape, row: int, group: int, policy: LongHeads, angles: Any, left: int) -> list[Tensor]:
    """Outputs [text, dv] of a KV head's query heads, everything re-rotated as the paper does."""
    repeat = tape.steps[0].queries.shape[1] // tape.keys[0].shape[1]
    heads = [tape.query(row, group * repeat + i)[left:] for i in range(repeat)]
    keys, values = tape.key(row, group)[left:], tape.value(row, group)[left:]
    size, scoring, outputs = policy.chunk_size, tape.steps[0].scoring, [[] for _ in heads]
    chunks = [represent(heads, keys, values, c, size, scoring, angles) for c in range(len(keys) // size)]
    begin = max(policy.begin_selective_length or 0, policy.budget_tokens)
    for at in range(len(keys)):
        own = at // size
        places = list(range(at + 1))
        if at >= begin:
            asked = sum(turned(head[at], -at, angles) for head in heads)
            rank = {c: float(asked @ chunks[c]) for c in range(1, own - 1)}
            best = sorted(rank, key=lambda c, rank=rank: -rank[c])[: policy.budget_tokens // size - 3]
            places = [c * size + i for c in sorted({0, own - 1, own, *best}) for i in range(size)]
            places = [place for place in places if place <= at]
        for i, head in enumerate(heads):
            query = turned(head[at], len(places) - 1 - at, angles)
            scores = [logit(query, turned(keys[old], new - old, angles), scoring) for new, old in enumerate(places)]
            outputs[i].append(mix(scores, [values[old] for old in places], sink_of(scoring, group * repeat + i)))
    return [torch.stack(own) for own in outputs]


def check_longheads(model: PreTrainedModel, policy: LongHeads, ends: list[int], left: list[int]) -> Any:
    tokens, padding = padded(len(left), ends[-1], left)
    cache = policy.make_cache(model)
    with taping() as tapes:
        feed(model, cache, tokens, padding, ends)
    angles = rotations(model)
    for layer, tape in tapes.items():
        if cache.layers[layer].window is not None:
            continue
        for row in range(len(left)):
            for group in range(tape.keys[0].shape[1]):
                wanted = longheads_oracle(tape, row, group, policy, angles[layer], left[row])
                for i, own in enumerate(wanted):
                    given = tape.output(row, group * len(wanted) + i)[left[row] :]
                    torch.testing.assert_close(given, own, atol=1e-9, rtol=1e-9)
    return cache


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_longheads(family: str, changes: dict[str, Any]) -> None:
    model = exact(family, num_hidden_layers=2, **changes)
    policy = LongHeads(budget_tokens=12, chunk_size=3)
    cache = check_longheads(model, policy, [16, 17, 18, 19, 24, 25, 26], [0, 4])
    for layer, held, read in zip(cache.layers, cache.lengths(), cache.entries_read(), strict=True):
        assert held == [26 if layer.window is None else layer.window - 1] * len(held)
        assert read == [12 if layer.window is None else layer.window - 1] * len(held)


def test_longheads_begins_later_and_reads_least() -> None:
    model = exact("llama", num_hidden_layers=1)
    check_longheads(
        model, LongHeads(budget_tokens=6, chunk_size=2, begin_selective_length=13), [11, 12, 22, 23], [0, 3]
    )


# Both


def dense(model: PreTrainedModel, tokens: Tensor, padding: Tensor, ends: list[int]) -> Tensor:
    release(model)
    return feed(model, DynamicCache(config=model.config), tokens, padding, ends)


POLICIES: list[Policy] = [
    TidalDecode(top_k=6, sparse_layer_start=0),
    LongHeads(budget_tokens=12, chunk_size=3),
]
COVERING: list[Policy] = [
    TidalDecode(top_k=64, sparse_layer_start=0),
    TidalDecode(sparse_layer_start=0),
    LongHeads(budget_tokens=30, chunk_size=10),
    LongHeads(chunk_size=4),
    LongHeads(budget_tokens=12, chunk_size=4, begin_selective_length=30),
]


@pytest.mark.parametrize("policy", COVERING, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_reading_all_is_the_dense_cache(family: str, policy: Policy) -> None:
    model = tiny(family, **({"layer_types": FULL5[:3]} if family == "gpt_oss" else {}))
    tokens, padding = padded(2, ENDS[-1])
    wanted = dense(model, tokens, padding, ENDS)
    cache = policy.make_cache(model)
    torch.testing.assert_close(feed(model, cache, tokens, padding, ENDS), wanted, atol=1e-5, rtol=1e-5)
    assert cache.entries_read() == cache.lengths() == [[ENDS[-1]] * 2] * 3


def test_a_selection_of_everything_is_dense_too() -> None:
    """One entry less than all, and that one is padding."""
    model = tiny("llama")
    tokens, padding = padded(1, 20, [3])
    wanted = dense(model, tokens, padding, [16, 17, 18, 19, 20])
    cache = TidalDecode(top_k=17, sparse_layer_start=0).make_cache(model)
    given = feed(model, cache, tokens, padding, [16, 17, 18, 19, 20])
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert cache.entries_read() == [[20, 20], [17, 17], [17, 17]]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_row_is_read_as_if_alone(policy: Policy) -> None:
    model = tiny("llama")
    tokens, padding = padded(2, 26)
    ends = [20, *range(21, 27)]
    both = feed(model, policy.make_cache(model), tokens, padding, ends)
    # Logits come pass by pass, and in every pass row by row.
    rows = torch.cat(
        [torch.arange(2)[:, None].expand(2, b - a)[padding[:, a:b].bool()] for a, b in pairwise([0, *ends])]
    )
    for row, left in enumerate(LEFT):
        own, alone = tokens[row : row + 1, left:], torch.ones(1, 26 - left, dtype=torch.long)
        wanted = feed(model, policy.make_cache(model), own, alone, [end - left for end in ends])
        torch.testing.assert_close(both[rows == row], wanted, atol=1e-5, rtol=1e-5)


def test_longheads_does_not_mind_how_a_text_is_fed() -> None:
    model = tiny("llama")
    policy, (tokens, padding) = POLICIES[1], padded(1, 27)
    wanted = feed(model, policy.make_cache(model), tokens, padding, [27])
    for ends in ([*range(1, 28)], [13, 26, 27], [11, 20, 27], [26, 27]):
        given = feed(model, policy.make_cache(model), tokens, padding, ends)
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - dense(model, tokens, padding, [27])).abs().max()) > 1e-3


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_candidates_taken_back_leave_no_trace(policy: Policy) -> None:
    model = tiny("llama")
    tokens, padding = padded(1, 30)
    wrong = tokens.flip(1)
    ends = [20, *range(21, 31)]
    wanted = feed(model, policy.make_cache(model), tokens, padding, ends)[20:]
    cache = policy.make_cache(model)
    feed(model, cache, tokens[:, :20], padding[:, :20], [20])
    cache.activate_past_recording()
    given = []
    with torch.no_grad():
        for start, end in ((20, 23), (23, 27), (27, 30)):
            tried = torch.cat([tokens[:, start:end], wrong[:, :5]], 1)
            given.append(model(tried, past_key_values=cache).logits[0, : end - start])
            cache.crop(-5)
            assert cache.lengths() == [[end, end]] * 3
    torch.testing.assert_close(torch.cat(given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_beams_and_assistants(policy: Policy) -> None:
    """Beams are rows that are copied and moved: as long as all rows are equal they do what greedy search does."""
    model, tokens = tiny("llama"), prompt(2, 20)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    beams = model.generate(tokens, past_key_values=policy.make_cache(model), num_beams=3, **settings)
    # Each text again, token by token and alone, scored against what beam search took it for.
    best = model.generate(
        tokens, past_key_values=policy.make_cache(model), num_beams=3, return_dict_in_generate=True,
        output_scores=True, length_penalty=0.0, **settings,
    )  # fmt: skip
    torch.testing.assert_close(best.sequences, beams)
    for row in range(2):
        text, ones = best.sequences[row : row + 1], torch.ones(1, 28, dtype=torch.long)
        logits = feed(model, policy.make_cache(model), text, ones, [20, *range(21, 29)])
        scores = logits.log_softmax(-1)[19:27].gather(1, text[0, 20:, None]).sum()
        torch.testing.assert_close(scores, best.sequences_scores[row], atol=1e-4, rtol=1e-4)
    greedy = model.generate(tokens[:1], past_key_values=policy.make_cache(model), **settings)
    assistant = tiny("llama", num_hidden_layers=2)
    with policy(model) as active:
        helped = model.generate(tokens[:1], assistant_model=assistant, **settings)
    torch.testing.assert_close(helped, greedy)
    assert active.cache is not None
    assert active.cache.lengths() == [[27, 27]] * 3


def test_what_is_held_and_what_is_read() -> None:
    model = tiny("llama")
    tokens, padding = padded(1, 40)
    full = Policy().make_cache(model)
    feed(model, full, tokens, padding, [39, 40])
    tidal = TidalDecode(top_k=6, sparse_layer_start=0).make_cache(model)
    feed(model, tidal, tokens, padding, [39, 40])
    assert tidal.nbytes == full.nbytes
    assert tidal.lengths() == [[40, 40]] * 3
    assert tidal.entries_read() == [[40, 40], [6, 6], [6, 6]]
    heads = LongHeads(budget_tokens=12, chunk_size=3).make_cache(model)
    feed(model, heads, tokens, padding, [39, 40])
    assert heads.entries_read() == [[12, 12]] * 3
    # 13 chunks of 2 KV heads; 4 query heads of 3 + 64 tokens, and their slots.
    assert heads.nbytes == full.nbytes + 3 * (13 * 2 * 8 * 4 + 67 * 4 * 8 * 4 + 67 * 8)
    heads.reset()
    assert heads.nbytes == 0


PASSKEY = "\nThe pass key is {}. Remember it.\n"
ASK = "\nWhat is the pass key? The pass key is "


def _text(key: str, length: int) -> str:
    source = Path(argparse.__file__).read_text()
    at = length // 3
    return source[:at] + PASSKEY.format(key) + source[at : length - len(PASSKEY) - len(ASK)] + ASK


TEXTS = [("48213", 960), ("90572", 1000), ("31786", 1024), ("64190", 700), ("17305", 1024), ("82946", 980)]


def _answered(policy: Policy, share: float, texts: list[tuple[str, int]] = TEXTS) -> int:
    """Of the passkeys, those answered while the last layer reads at most this share of what it holds."""
    loaded, found = load_model(), 0
    for key, length in texts:
        tokens = torch.tensor([loaded.encode(_text(key, length))])
        if isinstance(policy, LongHeads):  # where the question begins
            policy = replace(policy, begin_selective_length=length - len(ASK))
        cache = policy.make_cache(loaded.model)
        out = loaded.model.generate(tokens, past_key_values=cache, max_new_tokens=5, do_sample=False)
        found += loaded.decode(out[0, -5:].tolist()) == key
        assert cache.entries_read()[-1][0] <= share * cache.lengths()[-1][0]
    return found


def test_the_passkey_is_still_found_by_tidal() -> None:
    assert _answered(TidalDecode(top_k=32, sparse_layer_start=0, correction_layer=1), 0.05) == 6
    # The layer that retrieves chooses.
    assert _answered(TidalDecode(top_k=32, sparse_layer_start=1), 0.05) == 6


def test_the_passkey_is_found_in_chosen_chunks() -> None:
    """Not always, in so small a model: all are with the whole cache. Questions and answers are read from chunks."""
    texts = [(key, length) for key, length in TEXTS if length < 1000]
    assert _answered(LongHeads(budget_tokens=384, chunk_size=16), 0.55, texts) >= 2
    # With the first and the last two chunks alone there is nothing to find.
    assert _answered(LongHeads(budget_tokens=48, chunk_size=16), 0.07, texts) == 0


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TidalDecode(top_k=0), "top_k must be a whole number of at least 1"),
        (lambda: TidalDecode(top_k=3, budget_tokens=4), "top_k=3 and budget_tokens=4"),
        (lambda: TidalDecode(top_k=3, sparse_layer_start=-1), "sparse_layer_start is a layer's index"),
        (lambda: TidalDecode(top_k=3, correction_layer=2), "correction_layer is a layer above sparse_layer_start=2"),
        (lambda: TidalDecode(compression_ratio=0.5), "compression_ratio=0.5 has no meaning"),
        (lambda: LongHeads(budget_bytes=100), "budget_bytes=100 has no meaning"),
        (lambda: LongHeads(budget_tokens=1024, when="decode"), "when='decode' has no meaning"),
        (lambda: TidalDecode(top_k=8, storage=Quantised(bits=4)), "keeps everything as it came, so storage="),
        (lambda: LongHeads(budget_tokens=500, chunk_size=250), "below the 750 that it always keeps"),
        (lambda: LongHeads(budget_tokens=1000), "such as 768 or 1024"),
        (lambda: LongHeads(chunk_size=0), "chunk_size must be"),
        (lambda: LongHeads(begin_selective_length=-1), "begin_selective_length must be"),
    ],
)
def test_bad_settings(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"sparse_layer_start=2 chooses for the layers above it.*at most 1"):
        TidalDecode(top_k=4).make_cache(tiny("llama"))
    with pytest.raises(ValueError, match=r"correction_layer=9"):
        TidalDecode(top_k=4, correction_layer=9).make_cache(tiny("llama", num_hidden_layers=5))
    with pytest.raises(ValueError, match=r"layer 0 \(sparse_layer_start\) sees a window of 6.*\[1\]"):
        TidalDecode(top_k=4, sparse_layer_start=0).make_cache(tiny("gpt_oss"))
    with pytest.raises(ValueError, match=r"LongHeads reads chunks at new positions; GPT2LMHeadModel has no rotary"):
        LongHeads(budget_tokens=12, chunk_size=3).make_cache(tiny("gpt2"))


def test_texts_that_longheads_cannot_cut() -> None:
    model, policy = tiny("llama"), POLICIES[1]
    tokens, padding = padded(1, 20)
    padding[0, 7] = 0
    with pytest.raises(ValueError, match=r"pad the prompt on the left, and only there"):
        model(tokens, attention_mask=padding, past_key_values=policy.make_cache(model))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"a mask of the caller's own has no chunks"):
        model(tokens, attention_mask=mask, past_key_values=policy.make_cache(model))
    cache = policy.make_cache(model)
    long = prompt(1, 120)
    with torch.no_grad():
        model(long, past_key_values=cache)
        # 40 tokens stay; the last of them began a chunk, and its query is gone.
        cache.crop(-80)
        with pytest.raises(ValueError, match=r"more than 64 tokens were taken back"):
            model(long[:, 40:], past_key_values=cache)


def test_tidal_with_a_mask_of_the_callers_own() -> None:
    """Floats that are added, bools, and padding say the same."""
    model, policy = tiny("llama"), POLICIES[0]
    tokens, padding = padded(1, 20, [5])
    wanted = feed(model, policy.make_cache(model), tokens, padding, [19, 20])[-1]
    mask = padding[:, None, None].bool() & torch.ones(20, 20, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 20, 20).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    for own in (mask, added):
        cache = policy.make_cache(model)
        with torch.no_grad():
            model(
                tokens[:, :19],
                attention_mask=own[:, :, :19, :19],
                position_ids=positions[:, :19],
                past_key_values=cache,
            )
            given = model(
                tokens[:, 19:], attention_mask=own[:, :, 19:], position_ids=positions[:, 19:], past_key_values=cache
            ).logits[0, -1]
        assert cache.entries_read()[2] == [6, 6]
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copied_or_under_a_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the chosen say is the same, whether they are copied out or all are read under a mask."""
    tokens, padding = prompt(2, 60), torch.ones(2, 60, dtype=torch.long)
    padding[1, :7] = 0
    full = {"layer_types": ["full_attention"] * 4} if family == "gemma2" else {}
    found = []
    for most in (0, 10**6):
        monkeypatch.setattr("manyheads.shrink.policies.tidal.COPIED", most)
        model = tiny(family, num_hidden_layers=4, **full).double()
        cache = TidalDecode(budget_tokens=5, sparse_layer_start=1).make_cache(model)
        found.append(feed(model, cache, tokens, padding, [50, *range(51, 61)]))
        assert cache.entries_read()[2] == [5, 5]
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=1e-9)
