"""Sets of boxes: how alike two boxes are, which of a predicted set is meant for which of the true one, and a loss.

Boxes are (middle x, middle y, width, height) in parts of the picture. b pictures, q predictions, t true boxes of which
some places hold none, c classes; the last logit stands for no box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the assignment and of the loss, and what a prediction of no box counts, as in DETR, arXiv:2005.12872.
WEIGHTS: Mapping[str, float] = {"class": 1.0, "l1": 5.0, "giou": 2.0}
NO_BOX = 0.1


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] -> left, top, right, bottom."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def overlaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [..., 4] that broadcast -> intersection over union, and the generalised one (arXiv:1902.09630):

    giou = iou - (hull - union) / hull,  hull: the smallest box around both; from -1 to 1

    Boxes without area have 0 in common with any.
    """
    one, other = corners(one), corners(other)
    sides = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])
    common = sides.clamp(min=0).prod(-1)
    union = sum((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (one, other)) - common
    hull = (torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])).prod(-1)
    tiny = torch.finfo(common.dtype).tiny
    iou = common / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def assigned(logits: Tensor, boxes: Tensor, classes: Tensor, true: Tensor) -> Tensor:
    """Which prediction is meant for each true box: [b, t] numbers below q, -1 for places that hold none.

    logits [b, q, c + 1], boxes [b, q, 4], classes [b, t] (below zero: none), true [b, t, 4]. The assignment whose sum
    of -p(class) + 5 L1 - 2 GIoU is the least, each prediction to one box at most. ValueError where a picture has more
    boxes than there are predictions.
    """
    from scipy.optimize import linear_sum_assignment

    there, (b, q) = classes >= 0, logits.shape[:2]
    most = int(there.sum(1).max()) if there.numel() else 0
    if most > q:
        raise ValueError(f"{most} boxes in a picture, and {q} predictions; want at least one for each (num_queries)")
    wide = torch.promote_types(boxes.dtype, torch.float32)
    share = logits.to(wide).softmax(-1).gather(2, classes.clamp(min=0)[:, None].expand(b, q, -1))
    pair = boxes[:, :, None].to(wide), true[:, None].to(wide)
    distance = (pair[0] - pair[1]).abs().sum(-1)
    cost = WEIGHTS["l1"] * distance - WEIGHTS["class"] * share - WEIGHTS["giou"] * overlaps(*pair)[1]
    if not bool(torch.isfinite(cost.masked_fill(~there[:, None], 0.0)).all()):
        raise ValueError("predicted logits or boxes are NaN or infinite: there is no telling which is meant for which")
    found = torch.full(classes.shape, -1)
    for row, (own, real) in enumerate(zip(cost.cpu(), there.cpu(), strict=True)):
        at = real.nonzero()[:, 0]
        queries, columns = linear_sum_assignment(own[:, at].numpy())
        found[row, at[torch.as_tensor(columns)]] = torch.as_tensor(queries)
    return found.to(classes.device)


def set_losses(logits: Tensor, boxes: Tensor, classes: Tensor, true: Tensor) -> dict[str, Tensor]:
    """DETR's, unweighted: `class`, the cross entropy of all predictions, those meant for no box at a tenth, by the sum
    of these weights; `l1` and `giou` of those meant for a box, per true box. Arguments as for `assigned`."""
    place = assigned(logits, boxes, classes, true)
    row, column = (place >= 0).nonzero(as_tuple=True)
    query = place[row, column]
    wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    wanted[row, query] = classes[row, column]
    weight = torch.ones(logits.shape[2], device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    weight[-1] = NO_BOX
    found, meant = boxes[row, query].to(weight.dtype), true[row, column].to(weight.dtype)
    count = max(1, len(row))
    return {
        "class": F.cross_entropy(logits.flatten(0, 1).to(weight.dtype), wanted.flatten(), weight),
        "l1": (found - meant).abs().sum() / count,
        "giou": (1 - overlaps(found, meant)[1]).sum() / count,
    }


def set_loss(logits: Tensor, boxes: Tensor, classes: Tensor, true: Tensor) -> Tensor:
    """class + 5 l1 + 2 giou of `set_losses`."""
    losses = set_losses(logits, boxes, classes, true)
    return torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()


@torch.no_grad()
def matched_overlap(logits: Tensor, boxes: Tensor, classes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Of each picture the overlap (IoU) that boxes found have with true ones of their class, in the assignment that
    makes the most of it, and how many boxes were found or there, whichever is more: [b] and [b]. All found, and nothing
    else, gives the mean IoU; a box too many, one missed, or one of another class counts as one of overlap 0. Found is a
    prediction that no class and no 'no box' outweighs. NaN where predictions are."""
    from scipy.optimize import linear_sum_assignment

    kind, there = logits.argmax(-1), classes >= 0
    kept = kind < logits.shape[2] - 1
    iou = overlaps(boxes[:, :, None].double(), true[:, None].double())[0]
    same = kept[:, :, None] & there[:, None] & (kind[:, :, None] == classes[:, None])
    gain = torch.where(same, iou, 0.0).cpu()
    total = [
        math.nan if bool(broken) else float(one[linear_sum_assignment(one.numpy(), maximize=True)].sum())
        for one, broken in zip(gain, (logits.isnan().flatten(1).any(1) | boxes.isnan().flatten(1).any(1)), strict=True)
    ]
    return torch.tensor(total, dtype=torch.float64), torch.maximum(kept.sum(1), there.sum(1)).cpu()
