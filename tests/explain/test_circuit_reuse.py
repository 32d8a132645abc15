"""Two tasks' prompts word by word, first-order effects against exact ones, adjusted heads against loops."""

from __future__ import annotations

import pytest
import torch
from words_model import words_llama

from manyheads.explain.detectors import PathPatching, circuit, coloured_objects, indirect_object
from manyheads.explain.studies import create_study
from manyheads.explain.studies.circuit_reuse import looking_at, random_heads
from manyheads.hosts.loading import load_model
from manyheads.hosts.taps import record


def test_indirect_objects_word_by_word() -> None:
    loaded = words_llama()
    task = indirect_object(loaded, 12, 3)
    orders = set()
    for i in range(12):
        words = loaded.decode(task.clean[i].tolist()).split()
        other = loaded.decode(task.corrupted[i].tolist()).split()
        one, two, giver = words[2], words[4], words[words.index(".") + 1]
        right, wrong = loaded.decode([int(task.right[i])]), loaded.decode([int(task.wrong[i, 0])])
        assert {one, two} == {right, wrong}
        assert giver == wrong != right
        changed = [j for j in range(len(words)) if words[j] != other[j]]
        assert changed == [words.index(".") + 1]
        assert other[changed[0]] not in (one, two)
        assert words[int(task.places[i, 0])] == wrong
        orders.add(one == right)
    assert orders == {True, False}


def test_coloured_objects_word_by_word() -> None:
    loaded = words_llama()
    task = coloured_objects(loaded, 12, 1)
    for i in range(12):
        words = loaded.decode(task.clean[i].tolist()).split()
        other = loaded.decode(task.corrupted[i].tolist()).split()
        start = len(words) - 1 - words[::-1].index("On")
        colour = {words[j + 2]: words[j + 1] for j in range(start, len(words)) if words[j] == "a"}
        assert words[-1] == "is"
        assert len(colour) == 3
        assert colour[words[-2]] == loaded.decode([int(task.right[i])])
        assert [j for j in range(len(words)) if words[j] != other[j]] == [len(words) - 2]
        assert other[-2] in colour
        wrong = [loaded.decode([own]) for own in task.wrong[i].tolist()]
        assert sorted([*wrong, colour[words[-2]]]) == sorted(colour.values())
        for word, place in zip(wrong, task.places[i].tolist(), strict=True):
            assert words[place] == word
            assert place > start


def test_bytes_have_no_names() -> None:
    with pytest.raises(ValueError, match="one token"):
        indirect_object(load_model(), 2)
    with pytest.raises(ValueError, match="count=0"):
        coloured_objects(words_llama(), 0)


def test_metric_and_accuracy_by_hand() -> None:
    task = coloured_objects(words_llama(), 2)
    logits = torch.zeros(2, 1, 200)
    logits[0, 0, task.right[0]], logits[0, 0, task.wrong[0, 1]] = 3.0, 2.0
    logits[1, 0, task.wrong[1, 0]] = 1.0
    output = type("Output", (), {"logits": logits})
    torch.testing.assert_close(task.metric(output), torch.tensor([2.0, -0.5]))
    assert task.accuracy(output) == 0.5


@pytest.mark.parametrize("direct", [True, False])
def test_estimates_are_effects_of_small_changes(direct: bool) -> None:
    loaded = words_llama()
    task, size = indirect_object(loaded, 2), 1e-3
    patching = PathPatching(loaded, task.clean, task.corrupted, task.metric)
    for layer, clean in patching._clean.items():
        patching._corrupted[layer] = clean + size * (patching._corrupted[layer] - clean)
    found = patching.estimates(direct=direct)
    assert float(found.abs().min()) > 0
    if direct:
        expected = patching.effects().effects
    else:
        expected = torch.zeros(3, 4, dtype=torch.float64)
        for layer in range(3):
            for head in range(4):

                def bumped(call: object, layer: int = layer, head: int = head) -> object:
                    out = call.output.clone()  # type: ignore[attr-defined]
                    out[:, head] += (patching._corrupted[layer] - patching._clean[layer])[:, head]
                    return out if call.layer == layer else None  # type: ignore[attr-defined]

                expected[layer, head] = patching._run(patching._feeds[0], bumped) - patching.clean
    # Norms of this model are float32's.
    most = expected.abs().max()
    torch.testing.assert_close(found / most, expected / most, rtol=0, atol=0.02)


def test_a_screen_of_everything_is_no_screen() -> None:
    loaded = words_llama()
    task = indirect_object(loaded, 2)
    patching = PathPatching(loaded, task.clean, task.corrupted, task.metric)
    whole = circuit(patching, share=0.2)
    assert circuit(patching, share=0.2, screen=12) == [whole[0], [h for h in whole[1] if h not in whole[0]]]
    with pytest.raises(ValueError, match="screen=0"):
        circuit(patching, screen=0)


@torch.no_grad()
def test_heads_look_where_they_are_told() -> None:
    loaded = words_llama()
    task = coloured_objects(loaded, 3)
    with record(loaded.model, kind="self") as before:
        loaded.model(task.clean)
    with looking_at(loaded.model, [(0, 1), (0, 2)], task.places), record(loaded.model, kind="self") as after:
        loaded.model(task.clean)
    one, two = before[0], after[0]
    torch.testing.assert_close(two.output[:, :, :-1], one.output[:, :, :-1])
    torch.testing.assert_close(two.output[:, [0, 3]], one.output[:, [0, 3]])
    for b in range(3):
        for head in (1, 2):
            expected = sum(one.value[b, head // 2, int(place)] for place in task.places[b]) / 2
            torch.testing.assert_close(two.output[b, head, -1], expected)
    assert not torch.equal(before[1].output, after[1].output)


def test_random_heads_are_others_of_the_same_layers() -> None:
    own = [(0, 1), (0, 2), (3, 0)]
    found = random_heads(own, 5, 4)
    assert [layer for layer, _ in found] == [0, 0, 3]
    assert len({*found, *own}) == 6
    assert found == random_heads(own, 5, 4) != random_heads(own, 5, 5)


@pytest.mark.parametrize(("raised", "shared", "seen"), [(0.9, 0.8, True), (0.4, 0.8, False), (0.9, 0.01, False)])
def test_verdict(raised: float, shared: float, seen: bool) -> None:
    study = create_study("circuit-reuse")
    figures = {"none": {"accuracy": 0.5}, "circuit": {"accuracy": raised, "shared": shared},
               "random": {"accuracy": 0.45, "shared": 0.1}}  # fmt: skip
    cells = [{"seed": seed, "mechanism": p["label"], **p, **figures[p["adjusted"]]}
             for seed in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:1]).seen is None
    assert len(study.plots(cells)) == 2
