"""Statistics of segmentations against loops, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.explain.segmentation import Segmented, overlay, segmentation_statistics, write_segmentation
from manyheads.tasks.draw import generator

SEED = generator("test-segmentation")


def picture(name: str = "one", **given: Any) -> Segmented:
    parts = {
        "pixels": torch.rand(6, 8, generator=SEED),
        "truth": torch.randint(3, (6, 8), generator=SEED),
        "predicted": torch.randint(3, (6, 8), generator=SEED),
        "attention": torch.rand(3, 4, generator=SEED),
    }
    return Segmented(name, **{**parts, **given})


def test_figures_against_loops() -> None:
    own = picture()
    found, right, ious = own.figures(), 0, []
    places = [(i, j) for i in range(6) for j in range(8)]
    for c in range(3):
        both = sum(bool(own.truth[p] == c) and bool(own.predicted[p] == c) for p in places)
        either = sum(bool(own.truth[p] == c) or bool(own.predicted[p] == c) for p in places)
        ious.append(both / either)
    right = sum(bool(own.truth[p] == own.predicted[p]) for p in places)
    total = float(own.attention.sum())
    entropy, inside = 0.0, 0.0
    for r in range(3):
        for c in range(4):
            p = float(own.attention[r, c]) / total
            entropy -= p * math.log(p)
            inside += p * float((own.predicted[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] > 0).double().mean())
    expected = {"iou": sum(ious) / 3, "accuracy": right / 48, "entropy": entropy / math.log(12), "inside": inside,
                "foreground": float((own.truth > 0).double().mean())}  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)
    same = picture(predicted=own.truth, truth=own.truth).figures()
    assert (same["iou"], same["accuracy"]) == (1, 1)


def test_statistics_of_a_data_set() -> None:
    empty = torch.zeros(6, 8, dtype=torch.long)
    two = picture("two", truth=empty, predicted=empty)
    one = picture("one")
    found = segmentation_statistics([one, two])
    assert [row["name"] for row in found["rows"]] == ["one", "two"]
    assert found["mean"]["iou"] == pytest.approx((one.figures()["iou"] + 1) / 2)
    background = found["classes"][0]
    assert background["pictures"] == 2
    assert background["pixels"] == pytest.approx((int((one.truth == 0).sum()) + 48) / 96)
    assert background["iou"] == pytest.approx((one.ious()[0] + 1) / 2)
    assert found["classes"][2]["pictures"] == 1
    assert found["classes"][2]["iou"] == pytest.approx(one.ious()[2])


def test_what_is_wrong_is_refused() -> None:
    for given, match in (
        ({"truth": torch.zeros(5, 8, dtype=torch.long)}, "same height and width"),
        ({"predicted": torch.rand(6, 8)}, "integers from 0"),
        ({"truth": torch.full((6, 8), -1)}, "integers from 0"),
        ({"attention": torch.zeros(3, 4)}, "not negative"),
        ({"attention": -torch.rand(3, 4)}, "not negative"),
    ):
        with pytest.raises(ValueError, match=match):
            picture(**given)
    with pytest.raises(ValueError, match="no pictures"):
        segmentation_statistics([])


def test_the_overlay_by_hand() -> None:
    truth = torch.zeros(2, 2, dtype=torch.long)
    predicted = torch.tensor([[0, 1], [0, 0]])
    own = Segmented("a", torch.full((2, 2), 0.4), truth, predicted, torch.tensor([[1.0, 0.5], [0.0, 0.0]]))
    expected = torch.tensor([[[0.7, 0.2, 0.2], [0.45, 0.2, 0.7]], [[0.2, 0.2, 0.2], [0.2, 0.2, 0.2]]])
    torch.testing.assert_close(overlay(own), expected)


def test_the_page_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.runs.page._libraries", lambda: "")
    found = write_segmentation([picture("<b>"), picture("two")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<b>:" not in page
    assert "&lt;b&gt;: mean IoU" in page
    specs = json.loads(page.split('id="charts-data">')[1].split("</script>")[0])["specs"]
    assert set(specs) == {"iou-entropy", "iou-inside"}
    assert f"{found['rows'][1]['iou']:.3f}" in page
