"""The other generated tasks: what is asked, by solvers in plain loops, and what a guess is worth."""

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from manyheads.tasks import IGNORED, Task, create_task
from manyheads.tasks.draw import distinct, distinct_weighted, generator

Solver = Callable[[dict[str, list[int]]], list[int]]


def accuracy(task: Task, solve: Solver) -> float:
    """Of a model that answers each example with solve(inputs), one token for each place with logits."""
    total = count = 0.0
    for batch in task.eval_batches(100):
        logits = torch.zeros(*batch.targets.shape, task.model_settings()["vocab_size"])
        for b in range(len(batch.targets)):
            answers = solve({key: part[b].tolist() for key, part in batch.inputs.items()})
            for t, answer in enumerate(answers):
                logits[b, t, answer] = 1
        good, asked = task.score(logits, batch.targets)
        total, count = total + good, count + asked
    return total / count


def constant(token: int) -> Solver:
    return lambda inputs: [token] * len(inputs.get("decoder_input_ids", inputs["input_ids"]))


def solve_induction(inputs: dict[str, list[int]]) -> list[int]:
    tokens = inputs["input_ids"]
    answers = []
    for t, token in enumerate(tokens):
        earlier = [s for s in range(t) if tokens[s] == token]
        answers.append(tokens[earlier[0] + 1] if earlier else 0)
    return answers


def solve_copy(inputs: dict[str, list[int]]) -> list[int]:
    data = [token for token in inputs["input_ids"] if token > 1]
    answers, given = [], 0
    for token in inputs["input_ids"]:
        answers.append(data[given] if token == 1 else 0)
        given += token == 1
    return answers


def solve_lookup(inputs: dict[str, list[int]]) -> list[int]:
    context = inputs["input_ids"]
    value_of = {context[t]: context[t + 1] for t in range(0, len(context), 2)}
    return [value_of[key] for key in inputs["decoder_input_ids"]]


def solve_transduce(kind: str) -> Solver:
    def solve(inputs: dict[str, list[int]]) -> list[int]:
        source, how = inputs["input_ids"], kind
        if kind == "mixed":
            how, source = {1: "reverse", 2: "sort", 3: "copy"}[source[0]], source[1:]
        written = list(reversed(source)) if how == "reverse" else sorted(source) if how == "sort" else source
        assert inputs["decoder_input_ids"] == [0, *written[:-1]]
        return written

    return solve


SOLVED = [
    (create_task("induction", n=32, vocabulary=64, queries=6, eval_examples=300), solve_induction, 1 / 64),
    (create_task("induction", n=31, vocabulary=31, queries=14, eval_examples=300), solve_induction, 1 / 31),
    (create_task("selective-copy", n=24, vocabulary=10, tokens=6, eval_examples=300), solve_copy, 1 / 8),
    (create_task("selective-copy", n=16, vocabulary=4, tokens=8, eval_examples=300), solve_copy, 1 / 2),
    (create_task("lookup", n=16, vocabulary=24, eval_examples=300), solve_lookup, 1 / 12),
    (create_task("lookup", n=16, vocabulary=17, eval_examples=300), solve_lookup, 1 / 9),
    *[
        (create_task("transduce", n=9, vocabulary=14, kind=kind, eval_examples=300), solve_transduce(kind), 1 / 10)
        for kind in ("reverse", "sort", "copy", "mixed")
    ],
]


@pytest.mark.parametrize(("task", "solve", "chance"), SOLVED)
def test_solver_is_perfect_and_a_guess_is_chance(task: Task, solve: Solver, chance: float) -> None:
    assert accuracy(task, solve) == 1.0
    guess = task.model_settings()["vocab_size"] - 1
    assert accuracy(task, constant(guess)) == pytest.approx(chance, abs=0.04)


def test_induction_asks_once_for_each_query_in_the_second_half() -> None:
    task = create_task("induction", n=20, vocabulary=40, queries=5)
    for batch in islice(task.train_batches(64, 0), 3):
        for tokens, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
            asked = [t for t in range(20) if targets[t] != IGNORED]
            assert len(asked) == 5
            assert min(asked) >= 10
            for t in range(20):
                before = tokens[:10].count(tokens[t]) - (t < 10)
                assert before == (1 if t in asked else 0)
            assert len({tokens[t] for t in asked}) == 5


def test_induction_distances_vary() -> None:
    batch = next(create_task("induction", n=20, vocabulary=40, queries=5).train_batches(200, 0))
    distances = set()
    for tokens, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
        distances |= {t - tokens.index(tokens[t]) for t in range(20) if targets[t] != IGNORED}
    assert distances == set(range(2, 20))


def test_selective_copy_layout() -> None:
    batch = next(create_task("selective-copy", n=20, vocabulary=9, tokens=5).train_batches(100, 0))
    places = set()
    for tokens, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
        assert tokens[15:] == [1] * 5
        assert tokens[:15].count(0) == 10
        assert 1 not in tokens[:15]
        assert targets[:15] == [IGNORED] * 15
        assert targets[15:] == [token for token in tokens[:15] if token != 0]
        places |= {t for t in range(15) if tokens[t]}
    assert places == set(range(15))


def test_lookup_asks_every_key_once_in_another_order() -> None:
    batch = next(create_task("lookup", n=12, vocabulary=30).train_batches(100, 0))
    moved = 0
    for context, queries in zip(*(part.tolist() for part in batch.inputs.values()), strict=True):
        keys, values = context[0::2], context[1::2]
        assert sorted(keys) == sorted(set(queries))
        assert max(keys) < 15 <= min(values)
        moved += keys != queries
    assert moved > 95


def test_mixed_transduction_has_all_kinds() -> None:
    batch = next(create_task("transduce", kind="mixed").train_batches(300, 0))
    shares = torch.bincount(batch.inputs["input_ids"][:, 0], minlength=4).double() / 300
    assert_close(shares, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]).double(), rtol=0, atol=0.1)
    assert batch.inputs["input_ids"][:, 1:].min() >= 4
    assert batch.inputs["input_ids"].shape[1] == create_task("transduce", kind="mixed").model_settings()["max_length"]


def test_transduction_targets_are_their_own_tensor() -> None:
    batch = next(create_task("transduce", kind="copy").train_batches(2, 0))
    batch.targets.fill_(IGNORED)
    assert batch.inputs["input_ids"].min() >= 4


@pytest.mark.parametrize(("count", "high"), [(3, 5), (2, 6), (4, 40), (5, 5), (1, 1)])
def test_distinct_draws_are_distinct_and_even(count: int, high: int) -> None:
    """Both ways of drawing: rejection where few of many are drawn, ranking otherwise."""
    drawn = distinct(20_000, count, 2, 2 + high, generator("test"))
    ordered = drawn.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    even = torch.full((high,), 1 / high, dtype=torch.float64)
    for place in range(count):
        shares = torch.bincount(drawn[:, place] - 2, minlength=high).double() / 20_000
        assert_close(shares, even, rtol=0, atol=0.015)


def test_distinct_pairs_are_even() -> None:
    drawn = distinct(30_000, 2, 0, 4, generator("pairs"))
    shares = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).double() / 30_000
    expected = torch.tensor([[0.0 if a == b else 1 / 12 for b in range(4)] for a in range(4)]).flatten().double()
    assert_close(shares, expected, rtol=0, atol=0.01)


def test_weighted_draw_of_all_is_a_permutation() -> None:
    drawn = distinct_weighted(100, 6, torch.arange(1, 7), generator("test"))
    assert_close(drawn.sort(1).values, torch.arange(6).expand(100, 6))


def test_generators_differ_by_purpose() -> None:
    seeds = {generator(*purpose).initial_seed() for purpose in [("a", "train", 1), ("a", "train", 11), ("a", "eval")]}
    assert len(seeds) == 3
    assert generator("a", 1).initial_seed() == generator("a", "1").initial_seed()
