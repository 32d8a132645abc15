"""Boolean functions: the labels of a row are those of one function of its class, and of few by chance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice, product

import pytest

from manyheads.tasks import IGNORED, create_task
from manyheads.tasks.functions import CLASSES

Point = tuple[int, ...]
Row = list[tuple[Point, int]]


def rows(count: int, **given: object) -> Iterator[Row]:
    task = create_task("functions", **given)
    batch = next(task.train_batches(count, 0))
    width = task.bits + 1
    for tokens, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
        row = []
        for start in range(0, len(tokens), width):
            label = targets[start + task.bits - 1]
            shown = tokens[start + task.bits] if start + task.bits < len(tokens) else label
            assert label in (IGNORED, shown)
            assert all(target == IGNORED for target in targets[start : start + task.bits - 1])
            row.append((tuple(2 * bit - 1 for bit in tokens[start : start + task.bits]), 2 * (shown - 2) - 1))
        yield row


def holds(literals: Point, x: Point) -> bool:
    return all(x[i] == want for i, want in enumerate(literals) if want)


def some(literals: Point, x: Point) -> bool:
    return any(x[i] == want for i, want in enumerate(literals) if want)


def ones(chosen: Point, x: Point) -> int:
    return sum(x[i] == 1 for i, there in enumerate(chosen) if there)


def dot(w: Point, x: Point) -> int:
    return sum(a * b for a, b in zip(w, x, strict=True))


def every(kind: str, bits: int) -> Iterator[Callable[[Point], bool]]:
    """All functions of the class, in plain words."""
    signed, subsets = product((-1, 0, 1), repeat=bits), product((0, 1), repeat=bits)
    if kind == "conjunction":
        return (lambda x, w=w: holds(w, x) for w in signed)
    if kind == "disjunction":
        return (lambda x, w=w: some(w, x) for w in signed)
    if kind == "sparse-disjunction":
        return (lambda x, w=w: some(w, x) for w in subsets if sum(w) == 4)
    if kind == "dnf":
        return (lambda x, c=c: any(holds(w, x) for w in c) for c in product(signed, repeat=3))
    if kind == "cnf":
        return (lambda x, c=c: all(some(w, x) for w in c) for c in product(signed, repeat=3))
    if kind == "parity":
        return (lambda x, w=w: ones(w, x) % 2 == 1 for w in subsets)
    if kind == "sparse-parity":
        return (lambda x, w=w: ones(w, x) == 1 for w in subsets if sum(w) == 2)
    if kind == "majority":
        return (lambda x, w=w: 2 * ones(w, x) > sum(w) for w in subsets)
    if kind == "halfspace":
        return (lambda x, w=w: dot(w, x) >= 1 for w in product(range(-3, 4), repeat=bits))
    return (lambda x, w=w, k=k: dot(w, x) > k + 0.5 for w in signed for k in range(-3, 3))


BITS = {"dnf": 3, "cnf": 3, "halfspace": 4}


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_labels_are_those_of_one_function(kind: str) -> None:
    bits = BITS.get(kind, 6)
    functions = list(every(kind, bits))
    flipped = 0
    for row in rows(8, kind=kind, bits=bits, points=24):
        assert any(all(f(x) == (y == 1) for x, y in row) for f in functions)
        (first, label), rest = row[0], row[1:]
        wrong = [(first, -label), *rest]
        flipped += any(all(f(x) == (y == 1) for x, y in wrong) for f in functions)
    assert flipped < 8


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_both_labels_occur(kind: str) -> None:
    bits = 28 if kind in ("dnf", "cnf") else 8
    labels = [y for row in rows(200, kind=kind, bits=bits) for _, y in row]
    assert 0.2 < sum(y == 1 for y in labels) / len(labels) < 0.8


def test_a_taught_conjunction_is_known_after_its_lesson() -> None:
    """Whoever drops what two positive points disagree on, and then keeps what breaks it, is right ever after."""
    for row in rows(40, teaching=True, bits=6, points=30):
        (low, _), (high, _) = row[0], row[1]
        assert row[0][1] == row[1][1] == 1
        literals = tuple(a if a == b else 0 for a, b in zip(low, high, strict=True))
        many = sum(map(abs, literals))
        assert [y for _, y in row[2 : 2 + many]] == [-1] * many
        assert all(sum(a != b for a, b in zip(x, low, strict=True)) == 1 for x, _ in row[2 : 2 + many])
        assert all(holds(literals, x) == (y == 1) for x, y in row)


def test_a_taught_form_shows_its_clauses() -> None:
    for row in rows(40, kind="dnf", teaching=True, bits=5, points=30):
        at, clauses = 0, []
        for _ in range(3):
            clause = row[at][0]
            assert row[at][1] == 1
            clauses.append(tuple(max(bit, 0) for bit in clause))
            at += 1 + sum(clauses[-1])
        assert all(any(holds(c, x) for c in clauses) == (y == 1) for x, y in row)


def test_the_nearest_neighbour_gives_the_label() -> None:
    task = create_task("functions", kind="nearest-neighbour", bits=5, points=30, anchors=10)
    asked = next(task.train_batches(2, 0)).targets
    assert (asked != IGNORED).sum(1).tolist() == [20, 20]
    for row in rows(30, kind="nearest-neighbour", bits=5, points=30, anchors=10):
        for at in range(1, 30):
            x, y = row[at]
            closest = max(range(at), key=lambda i: (dot(x, row[i][0]), -i))
            if at >= 10 or row[closest][0] == x:
                assert y == row[closest][1]


@pytest.mark.parametrize("given", [{}, {"kind": "nearest-neighbour"}, {"teaching": True}, {"kind": "cnf", "bits": 28}])
def test_functions_are_drawn_fast_enough(given: dict[str, object]) -> None:
    batches = create_task("functions", **given).train_batches(64, 0)
    next(batches)
    began = time.process_time()
    tokens = sum(batch.inputs["input_ids"].numel() for batch in islice(batches, 5))
    assert tokens / (time.process_time() - began) > 1e5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "xor"}, "kind='xor'; want one of"),
        ({"bits": 1}, "bits=1"),
        ({"kind": "sparse-disjunction", "bits": 3}, "bits=3; want a whole number from 4"),
        ({"kind": "nearest-neighbour", "points": 20}, "anchors=20; want fewer than points=20"),
        ({"kind": "parity", "teaching": True}, "teaching=true is for kind in"),
        ({"teaching": True, "points": 10}, "teaching takes up to 10 points for bits=8; want points > 10"),
        ({"teaching": "yes"}, "teaching='yes'"),
    ],
)
def test_functions_that_are_none_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("functions", **given)
