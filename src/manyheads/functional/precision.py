"""Where autocast must not reach."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def own_dtype(x: Tensor) -> AbstractContextManager[Any]:
    """Within it operators keep the dtype of what they are given, also under autocast: for what does not fit into half
    precision, and for what is written into tensors made beforehand."""
    kind = x.device.type
    there = kind != "meta" and torch.is_autocast_enabled(kind)  # torch knows of no autocast without numbers
    return torch.autocast(kind, enabled=False) if there else nullcontext()


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x| along an axis, and zero where x is zero: in float16 too, where the floor of `F.normalize` is nothing."""
    return F.normalize(x, dim=dim, eps=max(1e-12, torch.finfo(x.dtype).tiny))
