"""gCOG: every answer is worked out again from the tokens alone, and the splits differ where they say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from manyheads.compare.train import build_model
from manyheads.tasks import create_task
from manyheads.tasks.gcog import CLASSES, GRID, NODE, OPERATORS
from manyheads.tasks.task import loss_of

LETTERS = 13  # of the tokens: 0 padding, 1 end, 2 open, 3 none, 4 to 12 operators, 13 to 38 letters, 39 to 48 colours
HUES = 39
SPLITS = ["iid", "distractors", "systematic", "systematic-tree", "productive"]
Question = tuple[str, list[tuple[int, int]]]


def read(tokens: list[int]) -> tuple[list[Question], dict[tuple[int, int], tuple[int, int]]]:
    """The nodes in level order, and what stands at (down, across)."""
    nodes = []
    for start in range(0, tokens.index(1), NODE):
        operator, *rest = tokens[start : start + NODE]
        objects = [(rest[0], rest[1]), (rest[2], rest[3])]
        nodes.append((OPERATORS[operator - 4], [thing for thing in objects if thing[0] != 3]))
    seen = tokens[-2 * GRID * GRID :]
    there = {(i // GRID, i % GRID): (seen[2 * i + 1], seen[2 * i]) for i in range(GRID * GRID) if seen[2 * i]}
    return nodes, there


def asked(question: Question, there: dict[tuple[int, int], tuple[int, int]]) -> int:
    operator, objects = question
    found = []
    for shape, colour in objects:
        fits = [at for at in sorted(there) if shape in (2, there[at][0]) and colour in (2, there[at][1])]
        found.append(fits[0] if fits else None)
    if operator == "exist":
        return int(found[0] is None)
    down, across = found[0]
    if operator == "go":
        return 2 + [(y, x) for x in range(GRID) for y in range(GRID)].index((down, across))
    if operator == "getshape":
        return 102 + there[down, across][0] - LETTERS
    if operator == "getcolor":
        return 128 + there[down, across][1] - HUES
    value = sum(y + x for y, x in found) if operator.startswith("sum") else 1
    if operator.startswith("product"):
        for y, x in found:
            value *= y * x
    return int((value % 2 == 1) == operator.endswith("even"))


def walked(nodes: list[Question], there: dict[tuple[int, int], tuple[int, int]]) -> int:
    """Level by level: a statement's switch stands one level below, its two branches below that."""
    place, start, width = 0, 0, 1
    while True:
        answer = asked(nodes[start + place], there)
        start += width
        if start == len(nodes):
            return answer
        assert all(nodes[start + i] == ("switch", []) for i in range(width))
        start += width
        place, width = 2 * place + answer, 2 * width


def examples(split: str, count: int, evaluates: bool, **more: int) -> Iterator[tuple[list[int], int]]:
    task = create_task("gcog", split=split, eval_examples=count, **more)
    batch = next(task.eval_batches(count) if evaluates else task.train_batches(count, 0))
    return zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_tokens(split: str, evaluates: bool) -> None:
    for tokens, answer in examples(split, 150, evaluates):
        assert walked(*read(tokens)) == answer


def test_a_tree_of_depth_seven() -> None:
    for tokens, answer in examples("productive", 60, True, depth=7):
        nodes, there = read(tokens)
        assert len(nodes) == 22
        assert walked(nodes, there) == answer


def test_distractors_are_as_many_as_they_say() -> None:
    few = [len(read(tokens)[1]) for tokens, _ in examples("distractors", 200, False)]
    many = [len(read(tokens)[1]) for tokens, _ in examples("distractors", 200, True, distractors=30)]
    assert max(few) == 6
    assert min(few) == 0
    assert min(many) >= 29  # one of them gives way where an object takes its place
    assert max(many) == 31
    assert all(len(read(tokens)[1]) <= 1 for tokens, _ in examples("distractors", 50, True, distractors=0))


def test_what_is_got_is_the_only_one_at_depth_one() -> None:
    for tokens, _ in examples("distractors", 400, True, distractors=40):
        [(operator, objects)], there = read(tokens)
        shape, colour = objects[0]
        fits = [at for at in there if shape in (2, there[at][0]) and colour in (2, there[at][1])]
        assert len(fits) == 1 or operator == "exist"
        assert (shape == 2, colour == 2) == (operator == "getshape", operator == "getcolor")


def test_systematic_training_and_evaluation_ask_crosswise() -> None:
    first = {"exist", "sumeven", "producteven", "getshape"}
    for evaluates in (False, True):
        for tokens, _ in examples("systematic", 400, evaluates):
            operator, [(shape, colour)] = read(tokens)[0][0]
            early = (operator in first) != evaluates
            if early:
                assert colour == 2 or colour - HUES < 5
            else:
                assert shape == 2 or 5 <= shape - LETTERS < 10


def test_systematic_trees_cross_statements_and_ends() -> None:
    def pairs(evaluates: bool) -> set[tuple[str, str]]:
        found = set()
        for tokens, _ in examples("systematic-tree", 600, evaluates):
            nodes = [operator for operator, _ in read(tokens)[0] if operator != "switch"]
            found |= {(nodes[0], nodes[1]), (nodes[0], nodes[2])}
        return found

    trained, unseen = pairs(False), pairs(True)
    assert trained.isdisjoint(unseen)
    assert len(trained) == len(unseen) == 20


def test_productive_evaluation_is_deeper_and_padded_alike() -> None:
    task = create_task("gcog", split="productive", depth=5)
    shallow, deep = next(task.train_batches(3, 0)), next(task.eval_batches(3))
    assert shallow.inputs["input_ids"].shape == deep.inputs["input_ids"].shape == (3, 5 * 10 + 1 + 200)
    assert bool((shallow.inputs["input_ids"][:, 21:51] == 0).all())
    assert [len(read(row)[0]) for row in deep.inputs["input_ids"].tolist()] == [10, 10, 10]


def test_operators_and_existence_are_balanced() -> None:
    asked_for, exists = Counter(), Counter()
    for tokens, answer in examples("iid", 4000, False):
        operator = read(tokens)[0][0][0]
        asked_for[operator] += 1
        exists[answer] += operator == "exist"
    assert set(asked_for) == set(OPERATORS) - {"switch"}
    assert all(abs(count / 4000 - 1 / 8) < 0.02 for count in asked_for.values())
    assert abs(exists[0] / asked_for["exist"] - 0.5) < 0.08


def test_it_is_drawn_fast_enough() -> None:
    task = create_task("gcog", split="productive")
    batches = task.train_batches(64, 0)
    next(batches)
    began = time.process_time()
    tokens = sum(batch.inputs["input_ids"].numel() for batch in islice(batches, 10))
    assert tokens / (time.process_time() - began) > 1e5


def test_a_model_takes_it() -> None:
    task = create_task("gcog", eval_examples=4)
    size = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}
    model = build_model(task, {"name": "softmax"}, size)
    batch = next(task.train_batches(2, 0))
    logits = model(**batch.inputs).logits
    assert logits.shape == (2, CLASSES)
    loss_of(logits, batch.targets).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "hard"}, "split='hard'; want one of"),
        ({"depth": 4}, "depth=4; want 3, 5 or 7"),
        ({"depth": 9}, "depth=9"),
        ({"distractors": 41}, "distractors=41"),
        ({"features": 11}, "features=11"),
        ({"features": True}, "features=True"),
    ],
)
def test_what_does_not_exist_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("gcog", **given)
