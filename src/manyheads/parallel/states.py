"""LASP-2: what a process's tokens have written into the memory of linear attention is all that others need of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.functional.linear import Kernel, causal_read, recall, summarise
from manyheads.parallel.layout import Layout
from manyheads.parallel.wire import Place, all_gather


def state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    kernel: Kernel | None = None,
    *,
    causal: bool = False,
    padding: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Linear attention over a sequence of which every process holds its part by a contiguous layout; [b, h, n, d].

        M_r = sum over tokens j of process r of exp(-slope (end_r - j)) phi(k_j) v_j^T
        out_i = phi(q_i) (sum over s < r of exp(-slope (i - end_s)) M_s) + what i sees in its own shard,  if causal
        out_i = phi(q_i) sum over all s of M_s,  if not

    q, k [b, h, n, .], v [b, h, n, d]; kernel: features phi and whether rows are divided by their sums of weights, whose
    ones then stand in M beside the values; Kernel(floor=None), the base form of the paper, if None. One all-gather of
    M forward and one of its gradient backward, [b, h, f, d] each, whatever the length. slopes [h], causal only: decay
    per token, as in Lightning attention, which the released code has not; constants, gradients do not reach them.
    padding [b, n], True = real: tokens that are not there neither write nor age what is. All processes call alike.
    Source: Sun et al., LASP-2, arXiv:2502.07563.
    """
    at = layout.place
    kernel = Kernel(floor=None) if kernel is None else kernel
    _check(q, k, v, layout, causal=causal, padding=padding, slopes=slopes)
    memory = summarise(k, v, kernel, padding=padding, slopes=slopes)
    if not causal:
        everyone = torch.ones(at.size, at.size, 1, 1, dtype=memory.dtype, device=memory.device)
        return recall(q, _exchanged(memory, everyone, at), kernel).to(q.dtype)
    before = _exchanged(memory, _kept(q, padding, slopes, layout, memory.dtype), at)
    read = causal_read(q, k, v, kernel, memory=before, padding=padding, slopes=slopes)
    return read.mixed.to(q.dtype)


def whole_memory(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    kernel: Kernel,
    *,
    padding: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """What the tokens of all processes have written, as it has decayed by the last one, in every process: [b, h, f, w],
    to go on with token by token. No gradient passes between processes."""
    at = layout.place
    memory = summarise(k, v, kernel, padding=padding, slopes=slopes)
    counts = _counts(k, padding, slopes, layout)
    behind = (counts.sum(0) - counts.cumsum(0)).to(memory.dtype)[..., None]
    left = torch.ones_like(behind) if slopes is None else (-slopes.to(memory.dtype) * behind).exp()
    return _summed(all_gather(memory, at), left)


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool, padding: Tensor | None, slopes: Tensor | None
) -> None:
    name = "state_attention"
    if layout.kind != "contiguous":
        raise ValueError(f"{name}: a {layout.kind} layout was given; want Layout(length, 'contiguous'): all work alike")
    if not q.shape[:3] == k.shape[:3] == v.shape[:3]:
        raise ValueError(
            f"{name}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} were given; want one b, h, n"
        )
    layout.check(name, q.shape[2])
    if padding is not None and (padding.shape != (q.shape[0], q.shape[2]) or padding.dtype != torch.bool):
        raise ValueError(f"{name}: padding {padding.dtype} {tuple(padding.shape)} was given; want booleans [b, n]")
    if slopes is not None and (not causal or slopes.shape != q.shape[1:2] or slopes.requires_grad):
        raise ValueError(
            f"{name}: slopes of shape {tuple(slopes.shape)} were given with causal={causal}, "
            f"requires_grad={slopes.requires_grad}; want one constant for each of {q.shape[1]} heads and causal=True"
        )


def _kept(q: Tensor, padding: Tensor | None, slopes: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """[to, from, 1 or b, h or 1]: what is left of a process's memory where a later one begins, else zero."""
    at, counts = layout.place, _counts(q, padding, slopes, layout)
    ends = counts.to(dtype).cumsum(0)  # [size, 1 or b]
    begins = ends - counts
    between = begins[:, None] - ends[None, :]  # [to, from, 1 or b]
    earlier = torch.ones(at.size, at.size, dtype=torch.bool, device=q.device).tril(-1)[:, :, None, None]
    left = between[..., None] * (torch.zeros(1, dtype=dtype, device=q.device) if slopes is None else -slopes.to(dtype))
    return left.masked_fill(~earlier, -torch.inf).exp()


def _counts(x: Tensor, padding: Tensor | None, slopes: Tensor | None, layout: Layout) -> Tensor:
    """[size, 1 or b] tokens of each process, where they age real ones."""
    at = layout.place
    if padding is None or slopes is None:
        return torch.tensor([layout.count(rank) for rank in range(at.size)], device=x.device)[:, None]
    # Padding is asked for of all or of none: this is a call that every process must make.
    return all_gather(padding.sum(1), at)


def _exchanged(memory: Tensor, weights: Tensor, at: Place) -> Tensor:
    found: Tensor = _Exchange.apply(memory, weights, at)
    return found


class _Exchange(torch.autograd.Function):
    """memory of this process -> sum over processes s of weights[here, s] memory_s."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, weights: Tensor, at: Place) -> Tensor:
        ctx.weights, ctx.at = weights, at
        return _summed(all_gather(memory, at), weights[at.rank])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(all_gather(gradient, ctx.at), ctx.weights[:, ctx.at.rank]), None, None


def _summed(memories: Tensor, weights: Tensor) -> Tensor:
    """[size, b, h, f, w] under weights [size, 1 or b, 1 or h]."""
    return (memories * weights[..., None, None]).sum(0)
