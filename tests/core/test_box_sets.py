"""Sets of boxes: overlaps against areas counted cell by cell, assignments against all permutations, the loss against
transformers' own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.box_sets import assigned, corners, matched_overlap, overlaps, set_loss, set_losses


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Boxes inside the picture, on a raster of 1/16."""
    rng = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, 17, (*shape, 2, 2), generator=rng).sort(-1).values
    ends[..., 1] += ends[..., 0] == ends[..., 1]
    return (
        torch.stack([ends.double().mean(-1), (ends[..., 1] - ends[..., 0]).double()], -1).transpose(-1, -2).flatten(-2)
        / 16
    )


def _cells(box: Tensor) -> set[tuple[int, int]]:
    left, top, right, bottom = (round(16 * float(side)) for side in corners(box))
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def test_overlaps_are_shares_of_counted_cells() -> None:
    one, other = _random(40, seed=1), _random(40, seed=2)
    iou, giou = overlaps(one, other)
    for a, b, found, general in zip(one, other, iou, giou, strict=True):
        mine, yours = _cells(a), _cells(b)
        union, both = len(mine | yours), len(mine & yours)
        xs, ys = zip(*(mine | yours), strict=True)
        hull = (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1)
        assert float(found) == pytest.approx(both / union)
        assert float(general) == pytest.approx(both / union - (hull - union) / hull)


def test_boxes_without_area_have_nothing_in_common() -> None:
    point = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)
    iou, giou = overlaps(point, point)
    (iou + giou).backward()
    assert float(iou.detach()) == 0.0
    assert torch.isfinite(giou)
    assert torch.isfinite(point.grad).all()


def test_the_assignment_is_the_best_of_all_permutations() -> None:
    torch.manual_seed(0)
    logits, boxes, true = torch.randn(6, 5, 4).double(), _random(6, 5), _random(6, 3, seed=3)
    classes = torch.tensor([[0, 1, 2], [2, 2, -1], [-1, -1, -1], [1, -1, 0], [0, 0, 0], [-1, 2, -1]])
    place = assigned(logits, boxes, classes, true)
    share = logits.softmax(-1)
    for row in range(6):
        real = [t for t in range(3) if classes[row, t] >= 0]

        def cost(query: int, t: int, row: int = row) -> float:
            box, meant = boxes[row, query], true[row, t]
            own = 5 * (box - meant).abs().sum() - 2 * overlaps(box, meant)[1]
            return float(own - share[row, query, classes[row, t]])

        best = min(
            itertools.permutations(range(5), len(real)),
            key=lambda queries: sum(cost(q, t) for q, t in zip(queries, real, strict=True)),
        )
        assert tuple(place[row, real].tolist()) == best
        assert bool((place[row][classes[row] < 0] == -1).all())


def test_the_loss_is_that_of_transformers_detectors() -> None:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    torch.manual_seed(1)
    logits, boxes, true = torch.randn(4, 6, 4), _random(4, 6).float(), _random(4, 3, seed=3).float()
    classes = torch.tensor([[0, 1, 2], [2, -1, -1], [-1, -1, -1], [1, -1, 0]])
    labels = [
        {"class_labels": kind[kind >= 0], "boxes": box[kind >= 0]} for kind, box in zip(classes, true, strict=True)
    ]
    theirs = ImageLoss(HungarianMatcher(1, 5, 2), 3, 0.1, ["labels", "boxes"])
    found = theirs({"logits": logits, "pred_boxes": boxes}, labels)
    ours = set_losses(logits, boxes, classes, true)
    for name, key in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        torch.testing.assert_close(ours[name], found[key])
    wanted = found["loss_ce"] + 5 * found["loss_bbox"] + 2 * found["loss_giou"]
    torch.testing.assert_close(set_loss(logits, boxes, classes, true), wanted)


def test_a_set_without_any_box_is_a_loss_of_classes_alone() -> None:
    logits, boxes = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4, requires_grad=True)
    none = torch.full((2, 2), -1)
    losses = set_losses(logits, boxes, none, torch.zeros(2, 2, 4))
    assert float(losses["l1"].detach()) == 0.0
    assert float(losses["giou"].detach()) == 0.0
    torch.stack([*losses.values()]).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not boxes.grad.any()
    empty = set_losses(logits, boxes, torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 4))
    torch.testing.assert_close(empty["class"], losses["class"])


def test_the_score_of_a_set() -> None:
    true = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]])
    classes = torch.tensor([[1, 0]])

    def scored(kinds: list[int], boxes: Tensor) -> tuple[float, int]:
        logits = torch.nn.functional.one_hot(torch.tensor([kinds]), 3).float()
        total, count = matched_overlap(logits, boxes, classes, true)
        return float(total), int(count)

    both = true[:, [1, 0, 0]]
    assert scored([0, 1, 2], both) == (2.0, 2)  # all found, and nothing else
    assert scored([1, 0, 2], both) == (0.0, 2)  # the right places with the wrong classes
    assert scored([0, 1, 1], both) == (2.0, 3)  # one too many
    assert scored([2, 2, 2], both) == (0.0, 2)  # nothing
    half = both.clone()
    half[0, 0] = torch.tensor([0.75, 0.625, 0.5, 0.25])
    assert scored([0, 1, 2], half) == (1.5, 2)
    total, _ = matched_overlap(torch.full((1, 3, 3), math.nan), both, classes, true)
    assert math.isnan(float(total))


def test_what_cannot_be_assigned_is_refused() -> None:
    logits, true = torch.randn(1, 1, 3), _random(1, 2).float()
    with pytest.raises(ValueError, match="2 boxes in a picture, and 1 predictions"):
        assigned(logits, torch.rand(1, 1, 4), torch.tensor([[0, 1]]), true)
    with pytest.raises(ValueError, match="NaN"):
        assigned(logits, torch.full((1, 1, 4), math.nan), torch.tensor([[0, -1]]), true)
