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

    num_items_in_batch: how many those are, where several batches make a step. real: which places are no padding, whose
    labels do not count."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} for {list(logits.shape[:-1])} tokens; want one for each")
    labels, wide = labels.to(logits.device), logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.long() if labels.dtype == torch.uint8 else labels  # in a byte -100 is 156
    if real is not None:
        labels = labels.masked_fill(~real, -100)
    try:
        loss = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    except IndexError:
        asked = labels[labels != -100]
        raise ValueError(
            f"labels from {int(asked.min())} to {int(asked.max())}; want 0 to {logits.shape[-1] - 1}, and -100 where "
            "nothing is asked (of another mark: labels.masked_fill(labels == 255, -100))"
        ) from None
    count = (labels != -100).sum()
    if num_items_in_batch is None:
        return loss / count.clamp(min=1), 1.0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch, count / num_items_in_batch
