"""Nucleotides: what is predictable in a sequence, and the stages of the warm-up."""

from __future__ import annotations

import time
from itertools import islice

import pytest
import torch

from manyheads.compare.train import build_model
from manyheads.tasks import create_task
from manyheads.tasks.nucleotides import Nucleotides
from manyheads.tasks.task import loss_of

PLAIN = Nucleotides(n=64)


def test_targets_are_the_next_bases() -> None:
    batch = next(create_task("nucleotides").train_batches(4, 0))
    assert torch.equal(batch.inputs["input_ids"][:, 1:], batch.targets[:, :-1])
    assert set(batch.targets.flatten().tolist()) == {0, 1, 2, 3}


def test_the_third_quarter_is_the_reverse_complement_of_the_first() -> None:
    batch = next(create_task("nucleotides", n=255).train_batches(40, 0))
    bases = torch.cat([batch.inputs["input_ids"], batch.targets[:, -1:]], 1).tolist()
    same = total = 0
    for row in bases:
        for at in range(64):
            same += row[128 + at] == 3 - row[63 - at]
            total += 1
    assert 0.94 < same / total < 0.985  # one in twenty is drawn anew, and one in four of these is as before


def test_three_bases_tell_the_next_as_far_as_they_can() -> None:
    """Bits of the best guess by counts of what follows three bases, in the part without repeats and copies."""
    batch = next(PLAIN.train_batches(6000, 0))
    bases = batch.inputs["input_ids"][:, :32]
    counts = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    for at in range(3, 32):
        before = [bases[:, at - back] for back in (3, 2, 1)]
        counts.index_put_((*before, bases[:, at]), torch.ones(len(bases), dtype=torch.float64), accumulate=True)
    chances = counts / counts.sum(-1, keepdim=True)
    found = -float((counts * chances.log2()).sum() / counts.sum())
    assert abs(found - PLAIN.entropy()) < 0.01
    assert 1.0 < found < 1.8


def test_families_are_shared_by_sequences_and_seeds() -> None:
    def pieces(seed: int) -> set[tuple[int, ...]]:
        rows = next(create_task("nucleotides", n=512).train_batches(60, seed)).inputs["input_ids"].tolist()
        return {tuple(row[i : i + 20]) for row in rows for i in range(256)}

    assert len(pieces(0) & pieces(1)) > 100
    assert not {piece for piece in pieces(0) if len(set(piece)) == 1}


def test_the_length_doubles_and_the_tokens_stay() -> None:
    task = create_task("nucleotides", n=512, warm_up=4, stage_batches=3)
    assert task.lengths() == [64, 128, 256, 512]
    shapes = [tuple(batch.targets.shape) for batch in islice(task.train_batches(2, 0), 12)]
    assert shapes == [(16, 64)] * 3 + [(8, 128)] * 3 + [(4, 256)] * 3 + [(2, 512)] * 3
    assert next(task.eval_batches(5)).targets.shape == (5, 512)


def test_a_model_trains_through_the_stages() -> None:
    task = create_task("nucleotides", n=128, warm_up=2, stage_batches=1)
    size = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}
    model = build_model(task, {"name": "hyena"}, size)
    for batch in islice(task.train_batches(2, 0), 3):
        loss_of(model(**batch.inputs).logits, batch.targets).backward()


def test_nucleotides_are_drawn_fast_enough() -> None:
    batches = create_task("nucleotides").train_batches(64, 0)
    next(batches)
    began = time.process_time()
    tokens = sum(batch.targets.numel() for batch in islice(batches, 5))
    assert tokens / (time.process_time() - began) > 1e5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 63}, "n=63"),
        ({"warm_up": 5}, "warm_up=5 halves n=512 4 times; want whole lengths of at least 64"),
        ({"n": 1001, "warm_up": 2}, "warm_up=2 halves n=1001"),
        ({"stage_batches": 0}, "stage_batches=0"),
    ],
)
def test_stages_that_do_not_fit_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("nucleotides", **given)
