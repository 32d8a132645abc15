"""MQAR against a reading of its published rule in plain loops."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from manyheads.tasks import IGNORED, create_task
from manyheads.tasks.recall import Recall


def written_out(n: int, keys: list[int], values: list[int], slots: list[int]) -> tuple[list[int], list[int]]:
    """Input and targets of one example with zeros between, one token at a time."""
    stream, answers = [], []
    for key, value in zip(keys, values, strict=True):
        stream += [key, value]
        answers += [IGNORED, IGNORED]
    slot = 0
    while len(stream) < n:
        hit = slots.index(slot) if slot in slots else None
        stream += [0, 0] if hit is None else [keys[hit], 0]
        answers += [IGNORED, IGNORED] if hit is None else [values[hit], IGNORED]
        slot += 1
    return stream[:n], answers[:n]


def taken_apart(tokens: list[int], targets: list[int], pairs: int) -> tuple[list[int], list[int], list[int]]:
    """Keys, values and slots of one example."""
    keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    slots = []
    for key in keys:
        asked = [t for t in range(len(tokens)) if targets[t] != IGNORED and tokens[t] == key]
        assert len(asked) == 1
        assert (asked[0] - 2 * pairs) % 2 == 0
        slots.append((asked[0] - 2 * pairs) // 2)
    return keys, values, slots


@pytest.mark.parametrize(("n", "vocabulary", "pairs"), [(32, 64, 8), (40, 40, 3), (33, 21, 8), (16, 19, 1)])
@pytest.mark.parametrize("filled", [True, False])
def test_examples_follow_the_rule(n: int, vocabulary: int, pairs: int, filled: bool) -> None:
    task = Recall(n=n, vocabulary=vocabulary, pairs=pairs, random_non_queries=filled)
    batch = next(task.train_batches(50, 0))
    for tokens, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
        keys, values, slots = taken_apart(tokens, targets, pairs)
        assert len(set(keys)) == len(set(values)) == len(set(slots)) == pairs
        assert all(1 <= key <= vocabulary // 2 - 1 for key in keys)
        assert all(vocabulary // 2 <= value <= vocabulary - 1 for value in values)
        assert all(0 <= slot < (n - 2 * pairs) // 2 for slot in slots)
        expected, answers = written_out(n, keys, values, slots)
        assert targets == answers
        if not filled:
            assert tokens == expected
        assert all(token == want for token, want in zip(tokens, expected, strict=True) if want != 0)


def test_every_key_and_value_occurs_and_no_other() -> None:
    batches = list(islice(Recall(n=16, vocabulary=14, pairs=4).train_batches(200, 0), 5))
    context = torch.cat([batch.inputs["input_ids"][:, :8] for batch in batches])
    assert set(context[:, 0::2].flatten().tolist()) == {1, 2, 3, 4, 5, 6}
    assert set(context[:, 1::2].flatten().tolist()) == {7, 8, 9, 10, 11, 12, 13}


def test_filler_is_any_token() -> None:
    batch = next(Recall(n=64, vocabulary=8, pairs=1).train_batches(100, 0))
    filler = batch.inputs["input_ids"][:, 2:][batch.targets[:, 2:] == IGNORED]
    shares = torch.bincount(filler, minlength=8).double() / len(filler)
    assert_close(shares, torch.full((8,), 1 / 8, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("power_a", [0.01, 1.0, 2.0])
def test_slots_are_drawn_like_numpys_weighted_choice(power_a: float) -> None:
    """First and second key's slot, against the exact probabilities, and those of numpy's sequential draw."""
    task = Recall(n=20, vocabulary=30, pairs=3, power_a=power_a)
    space, count = 7, 40_000
    weights = [power_a * i ** (power_a - 1) for i in range(1, space + 1)]
    p = [w / sum(weights) for w in weights]
    second = [sum(p[i] * p[j] / (1 - p[i]) for i in range(space) if i != j) for j in range(space)]
    batch = task.sample(count, torch.Generator().manual_seed(0))
    tokens = batch.inputs["input_ids"]
    shares = []
    for key in range(3):
        here = (tokens == tokens[:, 2 * key : 2 * key + 1]) & (batch.targets != IGNORED)
        slots = (here.double().argmax(1) - 6) // 2
        shares.append(torch.bincount(slots, minlength=space).double() / count)
    assert_close(shares[0], torch.tensor(p).double(), rtol=0, atol=0.01)
    assert_close(shares[1], torch.tensor(second).double(), rtol=0, atol=0.01)
    rng = np.random.default_rng(0)
    third = np.bincount([rng.choice(space, 3, replace=False, p=p)[2] for _ in range(5000)], minlength=space) / 5000
    assert_close(shares[2], torch.from_numpy(third), rtol=0, atol=0.03)


def test_reading_the_context_answers_everything() -> None:
    task = Recall(n=64, vocabulary=40, pairs=8, eval_examples=300)
    total = count = guessed = 0.0
    for batch in task.eval_batches(64):
        tokens = batch.inputs["input_ids"]
        logits = torch.zeros(*tokens.shape, 40)
        for b, row in enumerate(tokens.tolist()):
            value_of = {row[t]: row[t + 1] for t in range(0, 16, 2)}
            for t, token in enumerate(row):
                logits[b, t, value_of.get(token, 0)] = 1
        good, asked = task.score(logits, batch.targets)
        total, count = total + good, count + asked
        constant = torch.zeros(*tokens.shape, 40)
        constant[..., 25] = 1
        guessed += task.score(constant, batch.targets)[0]
    assert total == count == 300 * 8
    assert guessed / count == pytest.approx(1 / 20, abs=0.02)


def test_published_and_quick_settings() -> None:
    published = create_task("recall")
    assert published.config["vocabulary"] == 8192
    assert published.config["power_a"] == 0.01
    assert published.config["random_non_queries"] is True
    quick = Recall.quick()
    assert (quick.n, quick.vocabulary, quick.pairs) == (128, 512, 8)
