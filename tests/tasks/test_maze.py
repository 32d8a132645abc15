"""Mazes: the way is found again by breadth-first search over what the tokens say, and A*'s steps are replayed."""

from __future__ import annotations

import time
from collections import deque
from itertools import islice, pairwise

import pytest
import torch

from manyheads.compare.train import build_model, evaluate
from manyheads.tasks import IGNORED, create_task
from manyheads.tasks.maze import BREAK, CELL_0, CLOSE, CREATE, MASK, MAZE_END, PAD, PATH, PATH_END, PLAN, WALL
from manyheads.tasks.task import loss_of

SIZE = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}


def shortest(links: dict[int, set[int]], origin: int, target: int) -> list[int]:
    came, queue = {origin: origin}, deque([origin])
    while queue:
        here = queue.popleft()
        for near in links[here] - set(came):
            came[near] = here
            queue.append(near)
    way = [target]
    while way[-1] != origin:
        way.append(came[way[-1]])
    return way[::-1]


def tree_of(question: list[int]) -> tuple[dict[int, set[int]], int, int]:
    end = question.index(MAZE_END)
    links: dict[int, set[int]] = {}
    for at in range(1, end, 3):
        first, second, mark = question[at : at + 3]
        assert mark == BREAK
        links.setdefault(first, set()).add(second)
        links.setdefault(second, set()).add(first)
    return links, question[end + 2], question[end + 5]


def grid_of(question: list[int], size: int) -> tuple[dict[int, set[int]], int, int]:
    walls = {question[i + 1] - CELL_0 for i in range(4, len(question) - 1, 2) if question[i] == WALL}
    free = [(r, c) for r in range(size) for c in range(size) if r * size + c not in walls]
    links = {
        CELL_0 + r * size + c: {CELL_0 + y * size + x for y, x in free if abs(r - y) + abs(c - x) == 1} for r, c in free
    }
    return links, question[1], question[3]


def taken_apart(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[list[int], list[int]]:
    tokens, asked = inputs.tolist(), targets.tolist()
    question = tokens[: tokens.index(PATH) + 1]
    answer = [token for token in asked if token != IGNORED]
    assert asked[len(question) - 1 : len(question) - 1 + len(answer)] == answer
    assert tokens[len(question) : len(question) + len(answer) - 1] == answer[:-1]
    return question, answer


@pytest.mark.parametrize("size", [3, 5, 8])
def test_the_way_through_a_tree_is_the_only_one(size: int) -> None:
    batch = next(create_task("maze", size=size).train_batches(40, 0))
    for row, asked in zip(batch.inputs["input_ids"], batch.targets, strict=True):
        question, answer = taken_apart(row, asked)
        links, origin, target = tree_of(question)
        assert set(links) == set(range(CELL_0, CELL_0 + size * size))
        assert sum(len(near) for near in links.values()) == 2 * (size * size - 1)
        assert answer == [*shortest(links, origin, target), PATH_END]


def test_the_way_between_walls_is_a_shortest_one() -> None:
    batch = next(create_task("maze", kind="astar", size=6).train_batches(40, 0))
    for row, asked in zip(batch.inputs["input_ids"], batch.targets, strict=True):
        question, answer = taken_apart(row, asked)
        links, origin, target = grid_of(question, 6)
        assert 18 <= len(links) <= 26
        assert answer[-1] == PATH_END
        way = answer[:-1]
        assert (way[0], way[-1]) == (origin, target)
        assert all(b in links[a] for a, b in pairwise(way))
        assert len(way) == len(shortest(links, origin, target)) > 6


def test_the_trace_is_a_star() -> None:
    size = 5
    batch = next(create_task("maze", kind="astar", size=size, trace=True).train_batches(30, 0))
    number = CELL_0 + size * size
    for row, asked in zip(batch.inputs["input_ids"], batch.targets, strict=True):
        question, answer = taken_apart(row, asked)
        links, origin, target = grid_of(question, size)
        plan = answer.index(PLAN)
        steps = [answer[i : i + 4] for i in range(0, plan, 4)]
        opened, closed, expected = {}, set(), {origin}
        for kind, cell, gone, left in steps:
            gone, left = gone - number, left - number
            y, x = divmod(cell - CELL_0, size)
            assert left == abs(y - (target - CELL_0) // size) + abs(x - (target - CELL_0) % size)
            assert gone == len(shortest(links, origin, cell)) - 1
            if kind == CREATE:
                assert cell in expected
                expected.discard(cell)
                opened[cell] = (gone + left, len(opened))
            else:
                assert kind == CLOSE
                assert not expected
                assert cell == min(set(opened) - closed, key=opened.__getitem__)
                closed.add(cell)
                expected = links[cell] - set(opened) if cell != target else set()
        assert target in closed
        assert answer[plan:-1:2] == [PLAN] * ((len(answer) - plan - 1) // 2)
        assert len(answer[plan + 1 : -1 : 2]) == len(shortest(links, origin, target))


def test_an_answer_counts_as_a_whole() -> None:
    task = create_task("maze")
    batch = next(task.train_batches(6, 0))
    logits = torch.nn.functional.one_hot(batch.targets.clamp(min=0), task.model_settings()["vocab_size"]).float()
    assert task.score(logits, batch.targets) == (6.0, 6)
    last = (batch.targets[2] != IGNORED).nonzero()[-1, 0]
    logits[2, last] = 0
    logits[2, last, PAD] = 1
    assert task.score(logits, batch.targets) == (5.0, 6)


@pytest.mark.parametrize("kind", ["dfs", "astar"])
def test_masked_tokens_are_asked_for_and_nothing_of_the_question(kind: str) -> None:
    batch = next(create_task("maze-masked", kind=kind).train_batches(300, 0))
    shares = []
    for row, asks, asked in zip(*batch.inputs.values(), batch.targets, strict=True):
        assert set(asks.tolist()) == {MASK}
        question, way = row[: -len(asks)].tolist(), row[-len(asks) :]
        assert torch.equal(way == MASK, asked != IGNORED)
        assert bool((way == MASK).any())
        assert MASK not in question
        whole = torch.where(way == MASK, asked, way).tolist()
        end = whole.index(PATH_END)
        assert set(whole[end + 1 :]) <= {PAD}
        question = question[: question.index(PATH) + 1]
        links, origin, target = tree_of(question) if kind == "dfs" else grid_of(question, 5)
        assert all(b in links[a] for a, b in pairwise(whole[:end]))
        assert (whole[0], whole[end - 1], end) == (origin, target, len(shortest(links, origin, target)))
        shares.append(float((way == MASK).double().mean()))
    counts = torch.histc(torch.tensor(shares), 5, 0, 1) / len(shares)
    assert bool(((counts - 0.2).abs() < 0.09).all())


def test_evaluation_is_a_step_from_left_to_right() -> None:
    batch = next(create_task("maze-masked").eval_batches(100))
    for row, asks, asked in zip(*batch.inputs.values(), batch.targets, strict=True):
        [at] = (asked != IGNORED).nonzero()[:, 0].tolist()
        question, seen = row[: -len(asks)].tolist(), row[-len(asks) :].tolist()
        way = [*shortest(*tree_of(question)), PATH_END]
        assert seen == way[:at] + [MASK] * (len(seen) - at)
        assert asked[at] == way[at]


@pytest.mark.parametrize("name", ["maze", "maze-masked"])
def test_a_model_takes_mazes(name: str) -> None:
    task = create_task(name, size=3, eval_examples=4)
    model = build_model(task, {"name": "softmax"}, SIZE)
    batch = next(task.train_batches(2, 0))
    loss_of(model(**batch.inputs).logits, batch.targets).backward()
    assert evaluate(task, model, torch.device("cpu")).answers == 4


@pytest.mark.parametrize("given", [{}, {"size": 10}, {"kind": "astar", "size": 8, "trace": True}])
def test_mazes_are_drawn_fast_enough(given: dict[str, object]) -> None:
    batches = create_task("maze", **given).train_batches(64, 0)
    next(batches)
    began = time.process_time()
    tokens = sum(int((batch.inputs["input_ids"] != PAD).sum()) for batch in islice(batches, 5))
    assert tokens / (time.process_time() - began) > 1e5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 2}, "size=2"),
        ({"kind": "prim"}, "kind='prim'; want one of"),
        ({"trace": True}, "trace=true is for kind='astar'"),
        ({"kind": "astar", "trace": 1}, "trace=1"),
    ],
)
def test_mazes_that_are_none_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("maze", **given)
