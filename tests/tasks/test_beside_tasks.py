"""Tasks with kinds of tokens and with boxes: rules as loops, and who is shown what of them."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from manyheads.compare.train import build_model, inputs_of
from manyheads.tasks import IGNORED, create_task
from manyheads.tasks.modalities import rules

SIZE: dict[str, Any] = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "short_conv": 0}
CPU = torch.device("cpu")


def test_each_modality_goes_on_by_its_own_rule() -> None:
    task = create_task("modalities", n=40, symbols=12)
    batch = task.sample(50, torch.Generator().manual_seed(0))
    ids, kinds, tables = batch.inputs["input_ids"], batch.inputs["token_kinds"], rules(12)
    asked = batch.targets != IGNORED
    assert 0.7 < float(asked.double().mean()) < 0.9
    lengths = []
    for row, of in zip(ids.tolist(), kinds.tolist(), strict=True):
        starts = [0, *(i for i in range(1, 40) if of[i] != of[i - 1]), 40]
        lengths += [b - a for a, b in pairwise(starts[:-1])]
        for start, stop in pairwise(starts):
            for at in range(start + 1 + of[start], stop):
                assert row[at] == tables[of[start]][row[at - 1 - of[start]]]
    assert (min(lengths), max(lengths)) == (4, 12)
    for row in range(50):  # nothing is asked that the span does not tell
        for at in range(39):
            same = kinds[row, at] == kinds[row, at + 1]
            first = kinds[row, at] == 1 and (at == 0 or kinds[row, at - 1] == 0)
            assert bool(asked[row, at]) == bool(same and not first)
            if asked[row, at]:
                assert batch.targets[row, at] == ids[row, at + 1]


def test_the_answer_stands_right_of_the_asked_key() -> None:
    task = create_task("forms", fields=5, keys=7, values=9)
    batch = task.sample(40, torch.Generator().manual_seed(0))
    ids, boxes = batch.inputs["input_ids"], batch.inputs["boxes"]
    assert boxes.min() >= 0
    assert boxes.max() < 64
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    for row in range(40):
        tokens = list(zip(ids[row].tolist(), boxes[row].tolist(), strict=True))
        asked, title = min(tokens, key=lambda own: own[1][1])
        assert sum(box[1] == title[1] for _, box in tokens) == 1
        (key,) = [box for token, box in tokens if token == asked and box != title]
        right = [(box[0], token) for token, box in tokens if box[1] == key[1] and box[0] > key[0] and token >= 7]
        assert min(right)[1] - 7 == int(batch.targets[row])
    assert len({tuple(row) for row in (ids >= 7).tolist()}) > 20  # in random order


@pytest.mark.parametrize(
    ("task", "mechanism", "settings", "shown"),
    [
        ("modalities", "softmax", {}, set()),
        ("modalities", "mixture-of-transformers", {}, {"token_kinds"}),
        ("modalities", "softmax", {"by_kind": ["mlp"]}, {"token_kinds"}),
        ("modalities", "softmax", {"by_kind": ["adapter"], "adapter_size": 4}, {"token_kinds"}),
        ("forms", "softmax", {}, set()),
        ("forms", "skim", {}, {"boxes"}),
        ("forms", "softmax", {"positions": "boxes"}, {"boxes"}),
    ],
)
def test_who_reads_is_shown(task: str, mechanism: str, settings: dict[str, Any], shown: set[str]) -> None:
    made = create_task(task)
    model = build_model(made, {"name": mechanism}, {**SIZE, "positions": "learned", **settings})
    (batch,) = islice(made.train_batches(3, 0), 1)
    inputs = inputs_of(made, model, batch, CPU)
    assert set(inputs) == {"input_ids"} | shown
    assert made.aligned(made.answered(model(**inputs))).shape[0] == 3


def test_what_shares_weights_never_stands_for_plain_layers() -> None:
    """In a model of one layer there is none below it: refused in the pass, and not left out."""
    task = create_task("induction", n=16, vocabulary=32, queries=4)
    model = build_model(task, {"name": "shared-weights"}, {**SIZE, "layers": 1, "positions": "learned"})
    (batch,) = islice(task.train_batches(2, 0), 1)
    with pytest.raises(ValueError, match="layer 0, shared-weights, takes the weights of the layer below it"):
        model(**batch.inputs)


def test_what_does_not_fit_is_refused() -> None:
    for name, wrong, told in (
        ("modalities", {"symbols": 1}, "symbols=1; want a whole number from 2"),
        ("forms", {"fields": 9, "keys": 8}, "keys=8; want a whole number from 9"),
        ("forms", {"fields": 17}, "fields=17; want a whole number from 1 to 16"),
        ("forms", {"moved": 9}, "moved=9; want a whole number from 1 to 8"),
    ):
        with pytest.raises(ValueError, match=told):
            create_task(name, **wrong)
    with pytest.raises(ValueError, match="num_token_kinds=1 and by_kind"):
        build_model(create_task("recall"), {"name": "softmax"}, {**SIZE, "positions": "none", "by_kind": ["mlp"]})
