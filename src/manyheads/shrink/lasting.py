"""What a cache holds outlives a block of torch.inference_mode, in which it was made or moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P, R = ParamSpec("P"), TypeVar("R")


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
