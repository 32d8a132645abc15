"""Counting: answers are counted again from the question's tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from manyheads.tasks import IGNORED, create_task
from manyheads.tasks.counting import COLON, EQUALS, KINDS, LETTER_0, NUMBER_0, PIECE_0, words


def letters(token: int, pieces: int) -> str:
    number, found = token - PIECE_0, ""
    for _ in range(pieces):
        number, last = divmod(number, 27)
        found = (chr(97 + last) if last < 26 else "") + found
    return found


def questions(count: int, evaluates: bool = False, **given: object) -> Iterator[tuple[str, str, str, list[int]]]:
    """Kind, what is asked for, the word, and the answer's tokens."""
    task = create_task("counting", eval_examples=count, **given)
    batch = next(task.eval_batches(count) if evaluates else task.train_batches(count, 0))
    for row, asked in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
        colon, end = row.index(COLON), row.index(EQUALS)
        word = "".join(letters(token, task.pieces) for token in row[colon + 1 : end])
        sought = "".join(chr(97 + token - LETTER_0) for token in row[1:colon] if token >= LETTER_0)
        answer = [token for token in asked if token != IGNORED]
        assert asked[end : end + len(answer)] == answer
        yield KINDS[row[0] - 1], sought, word, answer


def counted(kind: str, sought: str, word: str) -> int:
    if kind == "character":
        return Counter(word)[sought]
    if kind == "substring":
        return sum(word[i : i + 2] == sought for i in range(len(word) - 1))
    return len(word) if kind == "length" else len(set(word))


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_the_number_is_that_of_the_word(kind: str, pieces: int) -> None:
    seen = set()
    for asked, sought, word, answer in questions(200, kind=kind, pieces=pieces):
        assert kind in (asked, "mixed")
        assert len(sought) == {"character": 1, "substring": 2}.get(asked, 0)
        assert answer == [NUMBER_0 + counted(asked, sought, word)]
        seen.add(answer[0])
    assert len(seen) >= 3


def test_the_trace_counts_along_the_word() -> None:
    for kind, sought, word, answer in questions(200, trace=True, pieces=2):
        assert [chr(97 + token - LETTER_0) for token in answer[::2]] == list(word)
        for end, token in enumerate(answer[1::2], start=1):
            assert token - NUMBER_0 == counted(kind, sought, word[:end])


def test_words_of_the_evaluation_are_new() -> None:
    train, held = words()
    assert len(train) > 3000
    assert len(held) > 300
    assert set(train).isdisjoint(held)
    assert {word for _, _, word, _ in questions(300, evaluates=True)} <= set(held)
    assert {word for _, _, word, _ in questions(300)} <= set(train)


def test_an_answer_with_a_wrong_step_does_not_count() -> None:
    task = create_task("counting", trace=True)
    batch = next(task.train_batches(5, 0))
    logits = torch.nn.functional.one_hot(batch.targets.clamp(min=0), task.model_settings()["vocab_size"]).float()
    assert task.score(logits, batch.targets) == (5.0, 5)
    first = (batch.targets[3] != IGNORED).nonzero()[0, 0]
    logits[3, first] = 0
    assert task.score(logits, batch.targets) == (4.0, 5)


@pytest.mark.parametrize("given", [{}, {"trace": True}])
def test_counting_is_drawn_fast_enough(given: dict[str, object]) -> None:
    batches = create_task("counting", **given).train_batches(64, 0)
    next(batches)
    began = time.process_time()
    tokens = sum(int((batch.inputs["input_ids"] != 0).sum()) for batch in islice(batches, 10))
    assert tokens / (time.process_time() - began) > 1e5


@pytest.mark.parametrize(
    ("given", "message"),
    [({"kind": "vowels"}, "kind='vowels'"), ({"pieces": 4}, "pieces=4"), ({"trace": 0}, "trace=0")],
)
def test_counting_of_nothing_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("counting", **given)
