"""A causal convolution of a few taps per channel, that a state continues."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.state import State


def causal_taps(x: Tensor, taps: Tensor, state: State | None, name: str) -> Tensor:
    """y_t = sum over l of taps[:, l] x_(t - l): x [b, n, e], taps [e, l] -> [b, n, e]. The state keeps the last l - 1
    rows of x under `name`; before the first token there are zeros."""
    n, before = x.shape[1], taps.shape[1] - 1
    if state is not None and name in state.fixed:
        rows = torch.cat((state.fixed[name], x), 1)
    else:
        rows = F.pad(x, (0, 0, before, 0))
    if state is not None:
        state.fixed[name] = rows[:, n:].clone()  # a view would keep the whole pass alive
    # One tap at a time: no window is copied, and the layout stays.
    y = taps[:, 0] * rows[:, before:]
    for lag in range(1, before + 1):
        y = torch.addcmul(y, taps[:, lag], rows[:, before - lag : before - lag + n])
    return y
