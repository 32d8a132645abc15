"""Focus directions, focused in-context learning, pushed beliefs and heads chosen for calibration, against loops."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close

from manyheads.hosts.taps import record
from manyheads.steer.beliefs import ROOMS, Probes, fit_probes, head_states, pushed, stories, story
from manyheads.steer.calibrate import calibrate, choose_heads
from manyheads.steer.focus import contextual_heads, fit_focus, focused, load_focus, save_focus
from manyheads.steer.focus_icl import focus_icl
from manyheads.steer.offsets import save_offsets


def llama(**changes: Any) -> Any:
    model = tiny("llama", **changes)
    model.set_attn_implementation("sdpa")
    return model


def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


def test_focus_directions_are_biases_before_the_rotation() -> None:
    model, tokens = llama(), prompt(2, 9)
    asks, offers, other = torch.randn(8), torch.randn(8), torch.randn(8)
    with focused(model, {(1, 3): (asks, offers), (1, 2): (torch.zeros(8), other)}, 0.5):
        given = logits(model, tokens)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
        attention.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
        attention.q_proj.bias[24:] += 0.5 * asks
        attention.k_proj.bias[8:] += 0.5 * (offers + other)  # heads 2 and 3 read the second group
    assert_close(given, logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_focus_is_learned_and_finds_what_is_relevant(tmp_path: Path) -> None:
    """Tokens 7 are relevant wherever they stand; the learned directions raise the attention on them elsewhere too."""
    model = llama()
    before = {name: own.clone() for name, own in model.named_parameters()}

    def example(seed: int) -> tuple[dict[str, Tensor], list[int]]:
        tokens = prompt(1, 12, seed) % 50 + 8
        places = random.Random(seed).sample(range(1, 11), 2)
        tokens[0, places] = 7
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, sorted(places)

    train, rest = [example(i) for i in range(8)], [example(100 + i) for i in range(6)]
    heads = contextual_heads(model, train, 2)
    directions = fit_focus(model, train, heads, steps=48, lr=0.1)

    def mass(scale: float) -> float:
        total = 0.0
        for inputs, places in rest:
            with focused(model, directions, scale), torch.no_grad(), record(model) as calls:
                model(**inputs)
            total += sum(float(calls[layer].weights([head])[0, 0, -1, places].sum()) for layer, head in heads)
        return total / len(rest) / len(heads)

    assert mass(1.0) > 1.5 * mass(0.0)
    found = load_focus(save_focus(directions, tmp_path / "focus.safetensors"))
    assert_close(found[heads[0]][1], directions[heads[0]][1], atol=0, rtol=0)
    for name, own in model.named_parameters():
        assert_close(own, before[name], atol=0, rtol=0)
        assert own.requires_grad


def test_contextual_heads_are_those_that_look_there() -> None:
    model, tokens = llama(), prompt(2, 10)
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    score = {
        (call.layer, head): float(call.weights([head])[:, 0, -1, [2, 5]].sum(-1).mean())
        for call in calls
        for head in range(4)
    }
    wanted = sorted(score, key=lambda place: -score[place])[:4]
    assert contextual_heads(model, [({"input_ids": tokens}, [2, 5])], 4) == wanted


def test_a_query_counts_once_per_batch_of_demonstrations() -> None:
    """The merged softmaxes of two batches, each with the query's own tokens, written out."""
    model, tokens = tiny("llama", num_hidden_layers=1).double(), prompt(1, 11)
    batches = [[0, 1, 2], [3, 4, 5]]
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    with focus_icl(model, range(6), 2), torch.no_grad(), record(model) as after:
        model(tokens)
    call = calls[0]
    for h in range(4):
        for i in range(6, 11):
            merged, mass = torch.zeros(8).double(), 0.0
            for batch in batches:
                seen = [*batch, *range(6, i + 1)]
                raw = [math.exp(float(call.query[0, h, i] @ call.key[0, h // 2, j]) * 8**-0.5) for j in seen]
                out = sum((w / sum(raw) * call.value[0, h // 2, j] for w, j in zip(raw, seen, strict=True)), merged * 0)
                merged, mass = merged + sum(raw) * out, mass + sum(raw)
            assert_close(after[0].output[0, h, i], merged / mass, atol=1e-6, rtol=1e-5)
    assert_close(after[0].output[:, :, :6], call.output[:, :, :6], atol=0, rtol=0)


def test_trivial_demonstration_tokens_are_hidden_from_the_rows_that_pay_them_least() -> None:
    model, tokens = tiny("llama", num_hidden_layers=1).double(), prompt(1, 9)
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    with focus_icl(model, range(1, 7), dropped=0.5), torch.no_grad(), record(model) as after:
        model(tokens)
    weights, value = calls[0].weights()[0], calls[0].value[0]
    for i in (7, 8):
        held = weights[:, i].mean(0)
        gone = sorted(range(1, 7), key=lambda j: float(held[j]))[:3]
        for h in range(4):
            row = weights[h, i].clone()
            row[gone] = 0
            assert_close(after[0].output[0, h, i], (row / row.sum()).double() @ value[h // 2], atol=1e-6, rtol=1e-5)


def test_focus_icl_of_padded_rows_and_while_decoding() -> None:
    model, tokens = llama(), prompt(1, 12)
    with focus_icl(model, range(6), 3, dropped=0.3), torch.no_grad():
        wanted = model(tokens).logits
        cache = model(tokens[:, :9], use_cache=True).past_key_values
        given = [model(tokens[:, [i]], past_key_values=cache).logits[:, 0] for i in range(9, 12)]
    assert_close(torch.stack(given, 1), wanted[:, 9:], atol=1e-4, rtol=1e-4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = (torch.arange(15) >= 3).long()[None]
    span = torch.zeros(1, 15, dtype=torch.bool)
    span[0, 3:9] = True
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with focus_icl(model, span, 3, dropped=0.3):
        found = logits(model, padded, attention_mask=mask, position_ids=places)
    assert_close(found[:, 3:], wanted, atol=1e-4, rtol=1e-4)


def test_stories_say_who_saw_what() -> None:
    for own in stories(40):
        first, second = sorted(ROOMS, key=lambda room: own.text.index(room))
        assert own.actual == second
        assert own.true_belief == ("stays" in own.text) == (own.answer == second)
        assert own.answer == (second if own.true_belief else first)
    assert sum(own.true_belief for own in stories(40)) == 20
    assert story(random.Random(1)) == story(random.Random(1))


def test_probes_find_the_head_that_holds_a_label() -> None:
    """Two Gaussian classes in one head of noise; the direction is that between their means, of length 1."""
    labels = torch.arange(80) % 2 == 0
    states = torch.randn(80, 2, 3, 6)
    axis = torch.nn.functional.normalize(torch.randn(6), dim=0)
    states[:, 1, 2] += torch.where(labels, 3.0, -3.0)[:, None] * axis
    probes = fit_probes(states, labels)
    assert probes.best(1) == [(1, 2)]
    assert float(probes.accuracy[1, 2]) == 1.0
    assert float(probes.directions[1, 2] @ axis) > 0.9
    assert_close(probes.directions.norm(dim=-1), torch.ones(2, 3))
    along = states[:56, 1, 2] @ probes.directions[1, 2]
    mean = sum(along.tolist()) / 56
    spread = (sum((each - mean) ** 2 for each in along.tolist()) / 56) ** 0.5
    assert float(probes.deviations[1, 2]) == pytest.approx(spread, rel=1e-4)
    assert_close(probes.offsets([(1, 2)])[1, 2], spread * probes.directions[1, 2], atol=1e-4, rtol=1e-4)


def test_head_states_are_read_at_the_last_place_before_the_projection() -> None:
    model, tokens = llama(), prompt(1, 7)
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    found = head_states(model, [{"input_ids": tokens}, {"input_ids": tokens}])
    assert found.shape == (2, 3, 4, 8)
    assert_close(found[1, 2, 3], calls[2].output[0, 3, -1])


def test_pushed_heads_move_from_the_first_place_on(tmp_path: Path) -> None:
    model, tokens = llama(), prompt(2, 8)
    vector = torch.randn(8)
    with torch.no_grad(), record(model, layers=[1]) as calls:
        model(tokens)
    with pushed(model, {(1, 2): vector}, 2.0, first=5), torch.no_grad(), record(model, layers=[1]) as after:
        model(tokens)
        wanted = model(tokens).logits
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        given = model(tokens[:, 6:], past_key_values=cache).logits
    assert_close(given, wanted[:, 6:], atol=1e-4, rtol=1e-4)
    shift = after[0].output - calls[0].output
    expected = torch.zeros_like(shift)
    expected[:, 2, 5:] = 2.0 * vector
    assert_close(shift, expected, atol=1e-5, rtol=1e-5)


def test_the_heads_whose_calibration_helps_are_chosen() -> None:
    """Every head tried by hand on two examples."""
    model = llama()
    examples = [({"input_ids": prompt(1, 14, seed)}, 20 + seed) for seed in range(2)]

    def worth() -> float:
        return sum(float(logits(model, own["input_ids"])[0, -1].log_softmax(-1)[token]) for own, token in examples) / 2

    base, gains = worth(), {}
    for head in range(4):
        with calibrate(model, 0.0, alpha=2.0, heads=[(1, head)]):
            gains[1, head] = worth() - base
    wanted = sorted((place for place in gains if gains[place] > 0), key=lambda place: -gains[place])
    assert 0 < len(wanted) < 4
    assert choose_heads(model, examples, beta=0.0, alpha=2.0, layers=[1]) == wanted
    assert choose_heads(model, examples, beta=0.0, alpha=2.0, layers=[1], count=1) == wanted[:1]
    with pytest.raises(ValueError, match="no single head"):
        choose_heads(model, examples, beta=0.0, alpha=1e6, layers=[1])


def test_what_these_refuse(tmp_path: Path) -> None:
    model, tokens, pair = llama(), prompt(1, 6), (torch.zeros(8), torch.zeros(8))
    odd = save_offsets({(0, 0): torch.zeros(7)}, tmp_path / "odd.safetensors")
    cases: list[tuple[str, Any]] = [
        ("directions is empty", lambda: focused(model, {}).__enter__()),
        ("heads 0 to 3; got \\[9\\]", lambda: focused(model, {(0, 9): pair}).__enter__()),
        ("no such layers", lambda: focused(model, {(9, 0): pair}).__enter__()),
        ("want \\[8\\]", lambda: focused(model, {(0, 0): (torch.zeros(3), torch.zeros(8))}).__enter__()),
        ("no q_proj and k_proj", lambda: focused(tiny("gpt2"), {(0, 0): pair}).__enter__()),
        ("behind their projections", lambda: focused(tiny("qwen3"), {(0, 0): pair}).__enter__()),
        ("no two vectors", lambda: load_focus(odd)),
        ("count=99", lambda: contextual_heads(model, [({"input_ids": tokens}, [1])], 99)),
        ("batches must be at least 1", lambda: focus_icl(model, [0], 0).__enter__()),
        ("between 0 and 1", lambda: focus_icl(model, [0], 1, dropped=2.0).__enter__()),
        ("both labels among", lambda: fit_probes(torch.zeros(4, 1, 1, 2), torch.ones(4))),
        ("offsets is empty", lambda: pushed(model, {}, 1.0).__enter__()),
        ("there are 2 heads", lambda: Probes(torch.zeros(1, 2), torch.zeros(1, 2, 3), torch.zeros(1, 2)).best(3)),
    ]
    for message, make in cases:
        with pytest.raises(ValueError, match=message):
            make()
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("_proj"))
