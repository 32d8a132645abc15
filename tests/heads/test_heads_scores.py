"""Detectors find planted heads, stay silent on random models, and equal loops written from their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from written_heads import planted, random_llama

from manyheads.heads import Inputs, on_repeats, on_text
from manyheads.heads.scores import Meter, copies, equal_tokens
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import record

TEXT = "the cat sat on the mat and the dog sat on the log while the cat ate a rat near the vat of the old bat" * 3


def best(scores: Tensor) -> list[tuple[int, int]]:
    """Heads above a half."""
    return [(int(i), int(j)) for i, j in (scores > 0.5).nonzero()]


def test_planted_heads_are_found() -> None:
    inputs = Inputs(planted(), text=TEXT)
    repeats = on_repeats(inputs, length=80)
    assert best(repeats["echo"]) == [(0, 2), (1, 1)]
    assert best(repeats["induction"]) == [(1, 0)]
    text = on_text(inputs, length=80, recent=10)
    assert best(text["previous"]) == [(0, 0)]
    assert best(text["sink"]) == [(0, 1)]
    assert best(text["duplicate"]) == [(0, 2), (1, 1)]
    # The previous token and the query itself are both among the last ten.
    assert best(text["local"]) == [(0, 0), (0, 3)]


def test_random_models_have_no_such_heads() -> None:
    inputs = Inputs(random_llama())
    for name, scores in {**on_repeats(inputs, length=128), **on_text(inputs, length=128, recent=16)}.items():
        # By chance: 16 of 21 to 128 keys are the last ones, and one byte in nine of a text is a common one.
        limit = {"local": 0.35, "duplicate": 0.15}.get(name, 0.1)
        assert scores.max() < limit, name


def loop_scores(weights: Tensor, ids: list[int], period: int, sinks: int, recent: int) -> dict[str, Tensor]:
    """Definitions over [h, n, n] in float64, one entry at a time."""
    heads, n, _ = weights.shape
    names = ("echo", "induction", "sink", "local", "previous", "duplicate")
    mass = {name: torch.zeros(heads, dtype=torch.float64) for name in names}
    rows: dict[str, set[int]] = {name: set() for name in names}
    for i in range(n):
        for j in range(i + 1):
            kinds = []
            if i != j and (i - j) % period == 0:
                kinds.append("echo")
            if j > 0 and i != j - 1 and (i - (j - 1)) % period == 0:
                kinds.append("induction")
            if i >= sinks + recent and j < sinks:
                kinds.append("sink")
            if i >= sinks + recent and i - j < recent:
                kinds.append("local")
            if i - j == 1:
                kinds.append("previous")
            if i != j and ids[i] == ids[j]:
                kinds.append("duplicate")
            for kind in kinds:
                rows[kind].add(i)
                mass[kind] += weights[:, i, j]
    return {name: mass[name] / max(1, len(rows[name])) for name in names}


def test_scores_equal_loops(packaged: Loaded) -> None:
    inputs = Inputs(packaged, text=TEXT)
    ids, period, start = inputs.repeats(60, 0)
    assert (period, start) == (15, 0)
    for sequence, mine in (
        (ids, on_repeats(inputs, length=60, count=1)),
        (inputs.windows(60, 1)[0], on_text(inputs, length=60, recent=7, sinks=3, count=1)),
    ):
        with torch.no_grad(), record(packaged.model) as calls:
            packaged.model(sequence[None])
        wanted = [loop_scores(c.weights()[0].double(), sequence.tolist(), period, 3, 7) for c in calls]
        for name, scores in mine.items():
            torch.testing.assert_close(scores, torch.stack([own[name] for own in wanted]), rtol=1e-5, atol=1e-7)


def test_blocks_of_rows_add_up() -> None:
    weights = torch.rand(2, 3, 12, 12).tril()
    whole, parts = Meter(), Meter()
    whole.read(0, weights, slice(0, 12), copies(4, 1))
    for start in (0, 5, 10):
        rows = slice(start, min(12, start + 5))
        parts.read(0, weights[:, :, rows], rows, copies(4, 1))
    torch.testing.assert_close(whole.scores(), parts.scores())
    # Queries 5 to 11 have a copy; each of them sees one or two.
    pairs = [(5, 1), (6, 2), (7, 3), (8, 4), (9, 5), (9, 1), (10, 6), (10, 2), (11, 7), (11, 3)]
    wanted = torch.stack([weights[:, :, i, j].sum(0) for i, j in pairs]).sum(0) / 14
    torch.testing.assert_close(whole.scores()[0], wanted.double())


def test_queries_without_a_copy_do_not_count() -> None:
    meter = Meter()
    meter.read(0, torch.ones(1, 1, 4, 4).tril(), slice(0, 4), equal_tokens(torch.tensor([5, 6, 7, 5])))
    assert meter.scores().item() == 1
    assert meter.queries == {0: 1}


def test_the_packaged_model_has_induction_heads(packaged: Loaded) -> None:
    scores = on_repeats(Inputs(packaged), length=256, count=2)["induction"]
    assert scores[1, :4].min() > 0.8
    assert scores[[0, 2, 3]].max() < 0.2


@pytest.mark.parametrize(("text", "words"), [(" \n", "is empty"), ("too short", "has 9 tokens; at least 40")])
def test_text_that_cannot_be_used(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_text(Inputs(random_llama(), text=text), length=128, recent=16)
