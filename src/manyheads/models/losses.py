"""The loss over labels of single places: tokens, pixels, nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, real: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Mean cross entropy over labels other than -100, and these labels' share of all that one optimizer step sees.

    Of one logit the labels are 0 and 1, and the cross entropy that of there or not. num_items_in_batch: how many labels
    there are, where several batches make a step. real: which places are no padding, whose labels do not count."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} for {list(logits.shape[:-1])} tokens; want one for each")
    labels, wide = labels.to(logits.device), logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.long() if labels.dtype == torch.uint8 else labels  # in a byte -100 is 156
    if real is not None:
        labels = labels.masked_fill(~real, -100)
    loss = _summed(wide.flatten(0, -2), labels.flatten())
    count = (labels != -100).sum()
    if num_items_in_batch is None:
        return loss / count.clamp(min=1), 1.0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch, count / num_items_in_batch


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n, classes], labels [n]."""
    one, asked = logits.shape[1] == 1, labels != -100
    wanted = "0 or 1" if one else f"0 to {logits.shape[1] - 1}"
    try:
        if not one:
            return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        if bool((((labels < 0) | (labels > 1)) & asked).any()):
            raise IndexError
        cost = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
        return cost.masked_fill(~asked, 0.0).sum()
    except IndexError:
        raise ValueError(
            f"labels from {int(labels[asked].min())} to {int(labels[asked].max())}; want {wanted}, and -100 where "
            "nothing is asked (of another mark: labels.masked_fill(labels == 255, -100))"
        ) from None
