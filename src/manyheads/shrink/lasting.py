"""What a cache holds outlives the call that made it: a block of torch.inference_mode, and the gradient of a pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def lasting(method: Callable[P, R]) -> Callable[P, R]:
    """Tensors made by the method may be written to later, by whoever goes on with the cache: those made in
    inference mode may not, outside of it. The dense cache writes to nothing, so it goes on anywhere."""

    @wraps(method)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return outside


def without_a_way_back(out: Tensor) -> Tensor:
    """The output of a pass whose keys and values were taken in among others, without their gradients."""
    given: Tensor = _Forward.apply(out)
    return given


class _Forward(torch.autograd.Function):
    """Wrong gradients would look like any others."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(
            "a shrunk cache holds keys and values without their gradients, so no gradient of a later pass is whole: "
            "learn from a single pass, with use_cache=False, or with a DynamicCache after release(model)"
        )
