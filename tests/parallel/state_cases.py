"""What every process of a group holds of linear attention, against loops over all tokens in one."""

import functools
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from manyheads.functional.linear import Kernel, taylor_features, taylor_value
from manyheads.parallel import Layout, state_attention, traffic

SUMMED = Kernel(floor=None)
DIVIDED = Kernel(query=lambda x: F.elu(x) + 1, key=lambda x: F.elu(x) + 1)
TAYLOR = Kernel(features=taylor_features, value=taylor_value)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_process(q, k, v, kernel: Kernel, *, causal: bool, slopes, padding) -> Tensor:
    """Token by token: every weight as value(q . k), decayed by the real tokens between."""
    b, h, n, _ = q.shape
    q, k = kernel.query(q), kernel.key(k)
    rows = []
    for i in range(n):
        total, out = torch.zeros(b, h, dtype=q.dtype), torch.zeros(b, h, v.shape[-1], dtype=q.dtype)
        for j in range(i + 1 if causal else n):
            weight = kernel.value((q[:, :, i] * k[:, :, j]).sum(-1))
            if padding is not None:
                weight = weight * padding[:, None, j]
            if slopes is not None:
                between = torch.full((b, 1), i - j) if padding is None else padding[:, j + 1 : i + 1].sum(1)[:, None]
                weight = weight * torch.exp(-slopes * between)
            total = total + weight
            out = out + weight[..., None] * v[:, :, j]
        if kernel.floor is not None:
            out = out / torch.where(total > kernel.floor, total, 1.0)[..., None]
        rows.append(out)
    return torch.stack(rows, 2)


def equal(
    seed: int, n: int, kernel: Kernel, *, causal: bool = True, decays: bool = False, padded: bool = False
) -> None:
    draw, b, h, d = random.Random(seed), 2, 3, 4
    q, k, v, gradient = (drawn(seed + i, b, h, n, d) for i in range(4))
    slopes = torch.tensor([0.0, 0.1, 1.3], dtype=torch.float64) if decays else None
    padding = torch.tensor([[draw.random() < 0.6 for _ in range(n)] for _ in range(b)]) if padded else None
    if padding is not None:
        padding[1, : n // 2] = False
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = one_process(*whole, kernel, causal=causal, slopes=slopes, padding=padding)
    wanted.backward(gradient)

    layout = Layout(n, "contiguous")
    mine = [layout.shard(x, 2).requires_grad_() for x in (q, k, v)]
    shown = None if padding is None else layout.shard(padding)
    out = state_attention(*mine, layout, kernel, causal=causal, slopes=slopes, padding=shown)
    out.backward(layout.shard(gradient, 2))
    # Only now: a process that stopped at a difference would leave the others waiting for it.
    assert_close(out, layout.shard(wanted, 2).detach())
    for found, expected in zip(mine, whole, strict=True):
        assert_close(found.grad, layout.shard(expected.grad, 2))


def bytes_sent() -> None:
    """One state to each of the others, forward and backward, however long the sequence is."""
    size = dist.get_world_size()
    for n in (2, 40):
        layout = Layout(n, "contiguous")
        q, k, v = (layout.shard(drawn(0, 2, 3, n, 4, dtype=torch.float32), 2).requires_grad_() for _ in range(3))
        with traffic() as count:
            state_attention(q, k, v, layout, causal=True).sum().backward()
        assert count.bytes == 2 * (size - 1) * (2 * 3 * 4 * 4) * 4
        assert count.calls == (2 if size > 1 else 0)


CASES = {
    "causal": functools.partial(equal, 0, 17, SUMMED),
    "not causal": functools.partial(equal, 10, 14, SUMMED, causal=False),
    "divided": functools.partial(equal, 20, 13, DIVIDED),
    "divided, not causal, padded": functools.partial(equal, 30, 11, DIVIDED, causal=False, padded=True),
    "decay": functools.partial(equal, 40, 16, SUMMED, decays=True),
    "decay and padding": functools.partial(equal, 50, 19, SUMMED, decays=True, padded=True),
    "divided, decay and padding": functools.partial(equal, 60, 12, DIVIDED, decays=True, padded=True),
    "taylor": functools.partial(equal, 70, 10, TAYLOR),
    "one token": functools.partial(equal, 80, 1, DIVIDED, decays=True),
    "two tokens": functools.partial(equal, 90, 2, DIVIDED, padded=True, decays=True),
    "two tokens, not causal": functools.partial(equal, 95, 2, SUMMED, causal=False),
    "bytes sent": bytes_sent,
}
