"""Interventions: exact no-ops at their neutral setting, and what they say otherwise, against masks and loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close

from manyheads import create_attention
from manyheads.hosts.loading import load_model
from manyheads.hosts.taps import record, tap
from manyheads.steer import (
    boost,
    buckets,
    calibrate,
    fit_offsets,
    guided,
    head_effects,
    juice,
    perturb,
    pick_heads,
    position_invariant,
    redistribute,
    scaled,
    steer,
)

NEUTRAL: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "boost": lambda model: boost(model, slice(0, 4), 1.0),
    "buckets": lambda model: buckets(model, [10000.0]),
    "calibrate": lambda model: calibrate(model, 1.0),
    "juice": lambda model: juice(model, {(0, 1): 0.0}),
    "perturb": lambda model: perturb(model, 0.0),
    "position_invariant": lambda model: position_invariant(model, [(2, 5)]),
    "redistribute": lambda model: redistribute(model, slice(0, 4), 0.0, sink_dims=[0]),
    "scaled": lambda model: scaled(model, {(1, 2): 1.0}),
    "steer": lambda model: steer(model, {(1, 2): torch.ones(8)}, 0.0),
}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def llama(**changes: Any) -> Any:
    model = tiny("llama", **changes)
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_change_nothing(name: str) -> None:
    model, tokens = llama(), prompt(2, 12)
    wanted = logits(model, tokens)
    with NEUTRAL[name](model):
        assert_close(logits(model, tokens), wanted, atol=0, rtol=0)
    assert_close(logits(model, tokens), wanted, atol=0, rtol=0)


def test_boost_is_a_log_added_to_the_scores() -> None:
    model, tokens = llama(), prompt(1, 10)
    mask = torch.full((10, 10), -torch.inf).triu(1)
    mask[:, 2:5] += math.log(3.0)
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask[None, None]).logits
    with boost(model, slice(2, 5), 3.0):
        given = logits(model, tokens)
    assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def test_boost_while_decoding_equals_boost_at_once() -> None:
    model, tokens = llama(), prompt(1, 10)
    with boost(model, [0, 1, 8, 9], 4.0), torch.no_grad():
        wanted = model(tokens).logits
        cache = model(tokens[:, :9], use_cache=True).past_key_values
        given = model(tokens[:, 9:], past_key_values=cache).logits
    assert_close(given[:, 0], wanted[:, 9], atol=1e-5, rtol=1e-5)


def test_boosting_a_statement_makes_the_packaged_model_answer_from_it() -> None:
    """Two keys are told; boosting one of them decides which is answered."""
    loaded = load_model()
    text = "\nThe pass key is 11111. Remember it.\n" + "x = 1\n" * 6 + "\nThe pass key is 77777. Remember it.\n"
    ids = torch.tensor([loaded.encode(text + "y = 2\n" * 4 + "\nWhat is the pass key? The pass key is ")])
    at = [text.index("11111"), text.index("77777")]
    answers = []
    for place in at:
        heads = [(1, head) for head in range(8)]  # the layer that copies
        with boost(loaded.model, slice(place - 1, place + 5), 1e4, heads=heads), torch.no_grad():
            out = loaded.model.generate(ids, max_new_tokens=5, do_sample=False)
        answers.append(loaded.decode(out[0, -5:].tolist()))
    assert answers == ["11111", "77777"]


def first_layer(model: Any, tokens: Tensor, inside: AbstractContextManager[None]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and values of layer 0, and its outputs under an intervention."""
    with torch.no_grad(), record(model, layers=[0]) as calls:
        model(tokens)
    with inside, torch.no_grad(), record(model, layers=[0]) as changed:
        model(tokens)
    call = calls[0]
    return call.weights(), call.of_heads(call.value, list(range(call.heads))), changed[0].output


def test_calibrate_against_loops() -> None:
    model, tokens = tiny("llama").double(), prompt(2, 9)
    alpha, beta = 1.2, 0.3
    weights, values, given = first_layer(model, tokens, calibrate(model, beta, alpha=alpha, heads=[(0, 1), (0, 3)]))
    moved = 0
    for b in range(2):
        for h in (1, 3):
            a = weights[b, h]
            means = [sum(float(a[i, j]) for i in range(j, 9)) / (9 - j) for j in range(9)]
            sinks = [j for j in range(9) if means[j] > alpha / 9][1:]
            moved += len(sinks)
            for i in range(9):
                row = a[i].clone()
                freed = sum((1 - beta) * float(a[i, j]) for j in sinks)
                rest = sum(float(a[i, j]) for j in range(9) if j not in sinks)
                for j in range(9):
                    row[j] = a[i, j] * beta if j in sinks else a[i, j] * (1 + freed / rest)
                assert math.isclose(float(row.sum()), 1.0, abs_tol=1e-9)
                assert_close(given[b, h, i], row @ values[b, h], atol=1e-9, rtol=1e-7)
        assert_close(given[b, 0], weights[b, 0] @ values[b, 0], atol=1e-9, rtol=1e-7)
    assert moved > 3


@pytest.mark.parametrize("left", [True, False])
def test_calibrate_does_not_see_padding(left: bool) -> None:
    model, tokens = tiny("llama").double(), prompt(2, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, slice(0, 4) if left else slice(8, 12)] = False
    with calibrate(model, 0.2, alpha=1.2), torch.no_grad():
        both = model(tokens, attention_mask=real.long()).logits[1][real[1]]
        alone = model(tokens[1:, real[1]]).logits[0]
    assert_close(both, alone, atol=1e-6, rtol=1e-6)


def test_calibrate_remembers_the_prompts_sinks() -> None:
    model, tokens = llama(), prompt(1, 9)
    with calibrate(model, 0.2, alpha=1.2), torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        with record(model, layers=[0]) as calls:
            model(tokens[:, :1], past_key_values=cache)
    plain = calls[0].weights() @ calls[0].of_heads(calls[0].value, list(range(4)))
    assert float((plain - calls[0].output).abs().max()) > 1e-4


def test_perturb_mixes_with_the_identity() -> None:
    model, tokens = tiny("llama").double(), prompt(1, 7)
    weights, values, given = first_layer(model, tokens, perturb(model, 0.4, heads=[(0, 2)]))
    mixed = 0.6 * weights[:, 2] + 0.4 * torch.eye(7)
    assert_close(given[:, 2], mixed @ values[:, 2], atol=1e-9, rtol=1e-7)
    assert_close(given[:, 1], weights[:, 1] @ values[:, 1], atol=1e-9, rtol=1e-7)
    strong, weak = torch.tensor([2.0]), torch.tensor([1.5])
    assert_close(guided(strong, weak, 3.0), torch.tensor([3.5]))


def test_steer_is_a_bias_behind_the_head() -> None:
    model, tokens, vector = llama(), prompt(2, 8), torch.randn(8)
    with steer(model, {(1, 3): vector}, 0.5):
        given = logits(model, tokens)
    o_proj = model.model.layers[1].self_attn.o_proj
    o_proj.bias = torch.nn.Parameter(0.5 * o_proj.weight[:, 24:32] @ vector)
    assert_close(given, logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_scaling_by_zero_is_a_model_without_the_head() -> None:
    model, tokens = llama(), prompt(2, 8)
    with scaled(model, {(2, 0): 0.0, (2, 1): 2.0}):
        given = logits(model, tokens)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[:, :8] *= 0
        model.model.layers[2].self_attn.o_proj.weight[:, 8:16] *= 2
    assert_close(given, logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_offsets_learn_an_answer_and_leave_the_model_as_it_was() -> None:
    model, tokens = llama(), prompt(4, 8)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = 5
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    heads = pick_heads(model, tokens, labels, 3, steps=5)
    assert len(set(heads)) == 3
    offsets = fit_offsets(model, tokens, labels, heads, steps=40, lr=0.05)
    with steer(model, offsets), torch.no_grad():
        after = float(model(tokens, labels=labels).loss)
    with torch.no_grad():
        assert after < 0.5 * float(model(tokens, labels=labels).loss)
    for name, parameter in model.named_parameters():
        assert_close(parameter, before[name], atol=0, rtol=0)
        assert parameter.requires_grad


def test_redistribute_against_loops() -> None:
    model, tokens = tiny("llama").double(), prompt(1, 10)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens[0, 3], 5] = 40.0
        model.model.embed_tokens.weight[tokens[0, 0], 5] = -40.0
    sinks = [j for j in range(10) if tokens[0, j] in (tokens[0, 3], tokens[0, 0])]
    image, share, centric, least = list(range(2, 6)), 0.6, 0.5, 0.3
    rule = {"threshold": 5.0, "centric": centric, "least": least}
    inside = redistribute(model, slice(2, 6), share, sink_dims=[5], layers=[0], **rule)
    weights, values, given = first_layer(model, tokens, inside)
    changed = 0
    for h in range(4):
        for i in range(10):
            a = [float(w) for w in weights[0, h, i]]
            told = [j for j in image if j not in sinks]
            held, good = sum(a[j] for j in image), sum(a[j] for j in told)
            row = list(a)
            if i >= 6 and held >= least and good / held >= centric:
                changed += 1
                budget = share * sum(a[j] for j in sinks)
                for j in sinks:
                    row[j] = (1 - share) * a[j]
                for j in told:
                    row[j] = a[j] + budget * a[j] / good
            assert_close(given[0, h, i], torch.tensor(row, dtype=torch.float64) @ values[0, h], atol=1e-8, rtol=1e-6)
    assert 4 <= changed < 16  # some heads and queries, not all


def test_juice_adds_what_the_first_run_said() -> None:
    model, tokens = llama(), prompt(2, 8)
    with torch.no_grad(), record(model, layers=[0, 2]) as calls:
        model(tokens)
    first = {call.layer: call.output for call in calls}

    def add(call: Any) -> Tensor:
        out = call.output.clone()
        out[:, 1] += (2.0 if call.layer == 0 else -0.5) * first[call.layer][:, 1]
        return out

    with tap(model, add, layers=[0, 2]):
        wanted = logits(model, tokens)
    with juice(model, {(0, 1): 2.0, (2, 1): -0.5}):
        given = logits(model, tokens)
        cached = model.generate(tokens[:1], max_new_tokens=4, do_sample=False)
        bare = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert_close(given, wanted, atol=1e-6, rtol=1e-6)
    assert cached.tolist() == bare.tolist()


def test_head_effects_name_the_head_that_speaks_for_a_token() -> None:
    """A head's output projection is turned to push token 5 whatever it reads."""
    model, tokens = llama(tie_word_embeddings=False), prompt(2, 8)
    with torch.no_grad(), record(model, layers=[2]) as calls:
        model(tokens)
        mean = calls[0].output[:, 2, -1].mean(0)
        push = model.lm_head.weight[5] - model.lm_head.weight[6]
        model.model.layers[2].self_attn.o_proj.weight[:, 16:24] += torch.outer(push, mean) / mean.pow(2).sum() * 5
    effects = head_effects(model, tokens, torch.tensor([5, 5]), torch.tensor([6, 6]))
    assert effects.shape == (3, 4)
    assert int(effects.flatten().argmax()) == 2 * 4 + 2


def test_buckets_mix_runs_of_several_bases() -> None:
    model, tokens = llama(), prompt(1, 12)
    runs = [logits(model, tokens)]
    for base in (17500.0, 25000.0):
        other = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": base})
        runs.append(logits(other, tokens))
    wanted = torch.zeros(12, 61, dtype=torch.float64)
    for place in range(12):
        each = [run[0, place].double().softmax(-1) for run in runs]
        total = sum(float(p.max()) for p in each)
        wanted[place] = sum((float(p.max()) / total * p for p in each), torch.zeros(61, dtype=torch.float64))
    with buckets(model, [10000.0, 17500.0, 25000.0]):
        given = logits(model, tokens)[0].double().exp()
        cached = model.generate(tokens, max_new_tokens=5, do_sample=False)
        bare = model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False)
        beams = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False)
        bare_beams = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False)
    assert_close(given, wanted, atol=1e-6, rtol=1e-4)
    assert cached.tolist() == bare.tolist()
    assert beams.tolist() == bare_beams.tolist()
    filled = model(tokens, use_cache=True).past_key_values
    with buckets(model, [10000.0, 17500.0]), pytest.raises(ValueError, match="filled outside"):
        model(tokens[:, :1], past_key_values=filled)


DOCUMENTS = [(3, 7), (7, 9), (9, 14)]


def swapped(tokens: Tensor, order: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    parts = [tokens[:, a:b] for a, b in (DOCUMENTS[i] for i in order)]
    spans, at = [], 3
    for part in parts:
        spans.append((at, at + part.shape[1]))
        at += part.shape[1]
    return torch.cat([tokens[:, :3], *parts, tokens[:, 14:]], 1), spans


def test_the_order_of_documents_does_not_matter() -> None:
    model, tokens = tiny("llama").double(), prompt(1, 18)
    with position_invariant(model, DOCUMENTS):
        wanted = logits(model, tokens)[:, 14:]
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        other, spans = swapped(tokens, order)
        with position_invariant(model, spans):
            assert_close(logits(model, other)[:, 14:], wanted, atol=1e-6, rtol=1e-6)
        assert float((logits(model, other)[:, 14:] - logits(model, tokens)[:, 14:]).abs().max()) > 1e-2


def rotated(row: Tensor, place: float, base: float = 10000.0) -> Tensor:
    half = row.numel() // 2
    out = row.clone()
    for i in range(half):
        angle = place * base ** (-i / half)
        x, y = float(row[i]), float(row[half + i])
        out[i], out[half + i] = x * math.cos(angle) - y * math.sin(angle), y * math.cos(angle) + x * math.sin(angle)
    return out


def test_position_invariance_against_loops() -> None:
    """One layer: importance, new places and the mask written out for each query."""
    model, tokens, n = tiny("llama", num_hidden_layers=1).double(), prompt(1, 17), 17
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    with position_invariant(model, DOCUMENTS), torch.no_grad(), record(model) as changed:
        model(tokens)
    call, given = calls[0], changed[0].output[0]
    scale = 8**-0.5
    for h in (0, 3):
        query, key, value = call.query[0, h], call.key[0, h // 2], call.value[0, h // 2]
        q, k = ([rotated(row, -i) for i, row in enumerate(rows)] for rows in (query, key))
        for i in range(n):
            own = next((d for d, (a, b) in enumerate(DOCUMENTS) if a <= i < b), None)
            askers = [i] if own is None else list(range(*DOCUMENTS[own]))
            places, seen = list(range(n)), [j for j in range(n) if j <= i]
            at = i
            if i >= 3:
                worth = {}
                for d, (a, b) in enumerate(DOCUMENTS):
                    if d == own:
                        worth[d] = math.inf
                        continue
                    worth[d] = 0.0
                    for asker in askers:
                        region = [j for j in range(3, 14) if own is None or not a_in(j, DOCUMENTS[own])]
                        total = sum(math.exp(float(q[asker] @ k[j]) * scale) for j in region)
                        worth[d] += sum(math.exp(float(q[asker] @ k[j]) * scale) for j in range(a, b)) / total / (b - a)
                start = 3
                for d in sorted(worth, key=lambda d: worth[d]):
                    for offset, j in enumerate(range(*DOCUMENTS[d])):
                        places[j] = start + offset
                    start += DOCUMENTS[d][1] - DOCUMENTS[d][0]
                at = places[i]
                if own is not None:
                    seen = [j for j in range(14) if j < 3 or j <= i or not a_in(j, DOCUMENTS[own])]
            scores = [float(rotated(q[i], at) @ rotated(k[j], places[j])) * scale for j in seen]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            wanted = sum(
                (w * value[j] for w, j in zip(weights, seen, strict=True)), torch.zeros(8, dtype=torch.float64)
            )
            assert_close(given[h, i], wanted, atol=1e-6, rtol=1e-5)


def a_in(j: int, span: tuple[int, int]) -> bool:
    return span[0] <= j < span[1]


def test_position_invariance_while_decoding() -> None:
    model, tokens = llama(), prompt(1, 18)
    with position_invariant(model, DOCUMENTS), torch.no_grad():
        wanted = model(tokens).logits
        cache = model(tokens[:, :16], use_cache=True).past_key_values
        given = [model(tokens[:, [i]], past_key_values=cache).logits[:, 0] for i in (16, 17)]
    assert_close(torch.stack(given, 1), wanted[:, 16:], atol=1e-4, rtol=1e-4)


def test_what_is_refused() -> None:
    model, tokens = llama(), prompt(2, 8)
    cases: list[tuple[str, Callable[[], AbstractContextManager[None]]]] = [
        ("at least 0; got -1", lambda: boost(model, [0], -1)),
        ("places from 0; got \\[-2\\]", lambda: boost(model, [-2], 2)),
        ("between 0 and 1; got 2", lambda: perturb(model, 2)),
        ("between 0 and 1; got -0.1", lambda: calibrate(model, -0.1)),
        ("no such layers", lambda: boost(model, [0], 2, heads=[(9, 0)])),
        ("heads 0 to 3; got \\[7\\]", lambda: boost(model, [0], 2, heads=[(0, 7)])),
        ("offsets is empty", lambda: steer(model, {})),
        ("offsets have 3 features", lambda: steer(model, {(0, 0): torch.ones(3)})),
        ("scales is empty", lambda: juice(model, {})),
        ("above 1, such as 1e4; got \\[0.5\\]", lambda: buckets(model, [0.5])),
        ("no single plain rotary", lambda: buckets(tiny("gpt2"), [5.0])),
        ("one after the other without gaps", lambda: position_invariant(model, [(0, 2), (3, 4)])),
        ("one row without padding", lambda: position_invariant(model, [(0, 2), (2, 4)])),
        ("no layer 5", lambda: redistribute(model, [0], 0.5, sink_dims=[1], layers=[5])),
        ("sink_dims is empty", lambda: redistribute(model, [0], 0.5, sink_dims=[])),
        ("\\[99\\] do not exist", lambda: redistribute(model, [0], 0.5, sink_dims=[99])),
    ]
    for message, make in cases:
        with pytest.raises(ValueError, match=message), make():
            model(tokens)
    mechanism = create_attention("hedgehog", 16, 4)
    with pytest.raises(ValueError, match="offers its weights and its output alone"), boost(mechanism, [0], 2):
        mechanism(torch.randn(1, 4, 16))
