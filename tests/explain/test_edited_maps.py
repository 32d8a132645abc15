"""Editable maps against loops, their log, and the study of edits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.explain.edited import EditableMap, patch_similarities
from manyheads.explain.studies import create_study, run_study
from manyheads.tasks.draw import generator

SEED = generator("test-edited")


def test_similarities_against_a_loop() -> None:
    picture, many = torch.randn(3, 4, generator=SEED), torch.randn(2, 5, 4, generator=SEED)
    found = patch_similarities(picture, many)
    for k in range(2):
        for p in range(3):
            best = max(float(picture[p] @ many[k, q]) / math.hypot(*picture[p]) / math.hypot(*many[k, q])
                       for q in range(5))  # fmt: skip
            assert abs(float(found[k, p]) - best) < 1e-5
    with pytest.raises(ValueError, match="want"):
        patch_similarities(picture, many[0])


def held(**given: Any) -> EditableMap:
    similarities = torch.tensor([[0.9, 0.1, 0.2, 0.0], [0.1, 0.8, 0.7, 0.0], [0.2, 0.6, 0.5, 0.1]])
    return EditableMap(
        similarities, [3, 4, 4], torch.tensor([0.9, 0.2, 0.1, 0.1]), **{"best": 2, "nearest": 1, **given}
    )


def test_decisions_against_a_loop() -> None:
    rows = torch.rand(30, 9, generator=SEED)
    labels = torch.randint(4, (30,), generator=SEED).tolist()
    own = EditableMap(rows, labels, torch.rand(9, generator=SEED), best=3, nearest=7)
    for _ in range(10):
        mask = torch.rand(9, generator=SEED) > 0.4
        found = own.edit(mask)
        scores = [sum(sorted((float(rows[c, p]) for p in range(9) if mask[p]), reverse=True)[:3]) for c in range(30)]
        order = sorted(range(30), key=lambda c: -scores[c])[:7]
        counts = {label: sum(labels[c] == label for c in order) for label in set(labels)}
        best = max(order, key=lambda c: (counts[labels[c]], -order.index(c)))
        assert found.decision == labels[best]


def test_edits_flip_are_undone_and_logged(tmp_path: Path) -> None:
    own = held()
    assert own.decision == 3
    assert own.mask.tolist() == [True, False, False, False]
    assert own.edit(own.mask).flipped is False
    assert own.toggle(1).decision == 3
    flipped = own.toggle(2)
    assert (flipped.decision, flipped.flipped) == (4, True)
    assert own.undo().decision == 3
    assert own.flips == 2
    own.save_log(tmp_path / "log.json", who="A", right=4)
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["right"] == 4
    assert [edit["what"] for edit in log["edits"]] == ["attention above the threshold", "a map", "patch 1 counts",
                                                      "patch 2 counts", "undone"]  # fmt: skip
    assert [edit["flipped"] for edit in log["edits"]] == [False, False, False, True, True]
    assert log["edits"][-1]["mask"] == [1, 1, 0, 0]


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="4 patches of 0 and 1"):
        held().edit([0.5, 1, 0, 0])
    with pytest.raises(ValueError, match="4 patches of 0 and 1"):
        held().edit([1, 0])
    with pytest.raises(ValueError, match="no patch 9"):
        held().toggle(9)
    with pytest.raises(ValueError, match="no edit to undo"):
        held().undo()
    with pytest.raises(ValueError, match="at least 1"):
        held(best=0)
    with pytest.raises(ValueError, match="a label per candidate"):
        EditableMap(torch.rand(3, 4), [1, 2], torch.rand(4))


@pytest.mark.parametrize(("edited", "flipped", "seen"), [(0.9, 0.1, True), (0.97, 0.1, False), (0.9, 0.0, False)])
def test_verdict_of_edits(edited: float, flipped: float, seen: bool) -> None:
    study = create_study("edited-maps")
    cells = [{"seed": s, **p, "accuracy": 0.95 if p["edit"] == "none" else edited, "flipped": flipped}
             for s in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:1]).seen is None


def test_edits_end_to_end(tmp_path: Path) -> None:
    results = run_study("edited-maps", tmp_path, seeds=1, settings={"pictures": 8, "candidates": 5})
    assert [cell["error"] for cell in results["cells"]] == [None] * 3
    assert results["cells"][0]["flipped"] == 0
