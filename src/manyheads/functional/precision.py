"""Where autocast must not reach."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def own_dtype(x: Tensor) -> AbstractContextManager[Any]:
    """Within it operators keep the dtype of what they are given, also under autocast: for what does not fit into half
    precision, and for what is written into tensors made beforehand."""
    kind = x.device.type
    there = kind != "meta" and torch.is_autocast_enabled(kind)  # torch knows of no autocast without numbers
    return torch.autocast(kind, enabled=False) if there else nullcontext()


def in_own_dtype(function: Callable[P, R]) -> Callable[P, R]:
    """A function of which all is computed within `own_dtype` of its first argument, a tensor that stands first."""

    @wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        with own_dtype(x):
            return function(*args, **kwargs)

    return kept


def as_kernels_take(*given: Tensor) -> tuple[Tensor, ...]:
    """What an attention kernel computes with: under autocast all is of its dtype (float64 it leaves alone), as models
    count on, whose queries, keys and values then differ. Otherwise what was given."""
    kind = given[0].device.type
    if not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in given)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x| along an axis, and zero where x is zero: in float16 too, where the floor of `F.normalize` is nothing."""
    return F.normalize(x, dim=dim, eps=max(1e-12, torch.finfo(x.dtype).tiny))
