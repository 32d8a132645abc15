"""Multi-dimensional damped exponential moving average (Ma et al., Mega, arXiv:2209.10655).

b batch, n tokens, e channels, s hidden dimensions per channel. For each channel, with state h of s numbers:

    h_t = decay * h_(t-1) + gain * x_t        y_t = sum over s of out * h_t
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens whose outputs come from one product with the kernel as a triangular matrix


def damped_ema(
    x: Tensor, decay: Tensor, gain: Tensor, out: Tensor, carried: Tensor | None = None, *, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """x [b, n, e]; decay in [0, 1], gain, out [e, s]; carried [b, e, s], the state before x -> y [b, n, e] and the
    state after it. Linear in n: dense within a block, and a scan over what the blocks hand on.
    """
    n, size = x.shape[1], min(block, x.shape[1])
    whole = n // size * size
    if carried is None:
        carried = x.new_zeros(x.shape[0], *decay.shape)
    if n == 1:
        carried = decay * carried + gain * x[:, 0, :, None]
        return (carried * out).sum(-1)[:, None], carried
    y, carried = _whole_blocks(x[:, :whole], decay, gain, out, carried, size)
    if whole == n:
        return y, carried
    rest, carried = damped_ema(x[:, whole:], decay, gain, out, carried, block=block)
    return torch.cat([y, rest], 1), carried


def _whole_blocks(
    x: Tensor, decay: Tensor, gain: Tensor, out: Tensor, carried: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    b, n, e = x.shape
    blocks = x.reshape(b * (n // size), size, e).permute(2, 0, 1)  # [e, blocks, size]
    steps = torch.arange(size + 1, device=x.device, dtype=decay.dtype)
    powers = decay[..., None] ** steps  # [e, s, size + 1]
    given = blocks @ (gain[..., None] * powers[..., :size]).flip(-1).transpose(1, 2)  # [e, blocks, s]
    given = given.view(e, b, -1, gain.shape[1]).permute(1, 2, 0, 3)
    held = _scan(torch.cat([carried[:, None], given], 1), powers[..., size])  # [b, blocks + 1, e, s], before each block
    before = held[:, :-1].permute(2, 0, 1, 3).flatten(1, 2)
    kernel = ((gain * out)[..., None] * powers[..., :size]).sum(1)
    y = blocks @ _triangular(kernel).transpose(1, 2) + before @ (out[..., None] * powers[..., 1:])
    return y.permute(1, 2, 0).reshape(b, n, e), held[:, -1]


def _triangular(kernel: Tensor) -> Tensor:
    """kernel [e, t] -> [e, t, t] with kernel[i - j] at (i, j) for j <= i and zeros above."""
    t = kernel.shape[-1]
    padded = torch.cat([kernel.new_zeros(kernel.shape[0], t - 1), kernel], -1)
    return padded.unfold(-1, t, 1).flip(-1)


def _scan(rows: Tensor, decay: Tensor) -> Tensor:
    """rows [b, c, e, s] -> h_c = decay h_(c-1) + rows_c, in log2 c steps."""
    reach = 1
    while reach < rows.shape[1]:
        rows = torch.cat([rows[:, :reach], rows[:, reach:] + decay * rows[:, :-reach]], 1)
        decay, reach = decay * decay, 2 * reach
    return rows
