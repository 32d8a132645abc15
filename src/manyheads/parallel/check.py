"""`torchrun --nproc-per-node 2 -m manyheads.parallel.check`: does every scheme here compute what one process does?"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.functional.linear import Kernel
from manyheads.parallel.heads import heads_attention
from manyheads.parallel.layout import Alone, Layout
from manyheads.parallel.ring import ring_attention
from manyheads.parallel.states import state_attention
from manyheads.parallel.wire import all_gather, place, traffic

# Not a multiple of anything, and more than a tile for each of two processes.
LENGTH, BATCH, WIDTH = 1537, 1, 32
# Of float32 sums over so many tokens, relative to the largest number.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Scheme:
    name: str
    kind: str
    attend: Callable[[Tensor, Tensor, Tensor, Layout], Tensor]


@dataclass(frozen=True)
class Found:
    """The largest error of the result and of the gradients, relative to the largest number, and bytes sent."""

    output: float
    gradients: float
    forward: int
    backward: int


def schemes(heads: int) -> list[Scheme]:
    slopes = torch.linspace(0.0, 0.1, heads)
    linear = Kernel(floor=None)
    return [
        Scheme("ring, causal, zigzag", "zigzag", lambda q, k, v, at: ring_attention(q, k, v, at, causal=True)),
        Scheme("ring, causal, contiguous", "contiguous", lambda q, k, v, at: ring_attention(q, k, v, at, causal=True)),
        Scheme("ring, all to all", "contiguous", lambda q, k, v, at: ring_attention(q, k, v, at)),
        Scheme("heads, causal", "zigzag", lambda q, k, v, at: heads_attention(q, k, v, at, causal=True)),
        Scheme("states, causal", "contiguous", lambda q, k, v, at: state_attention(q, k, v, at, linear, causal=True)),
        Scheme(
            "states, causal, decay",
            "contiguous",
            lambda q, k, v, at: state_attention(q, k, v, at, linear, causal=True, slopes=slopes.to(q.device)),
        ),
        Scheme("states, all to all", "contiguous", lambda q, k, v, at: state_attention(q, k, v, at, linear)),
    ]


def measure(scheme: Scheme, heads: int, device: torch.device) -> Found:
    """This process's tokens in the group, beside the same scheme on all tokens in this process alone."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(BATCH, heads, LENGTH, WIDTH, generator=drawn).to(device) for _ in range(4))
    layout = Layout(LENGTH, "zigzag" if scheme.kind == "zigzag" else "contiguous")
    alone = q, k, v = [x.requires_grad_() for x in (q, k, v)]
    wanted = scheme.attend(q, k, v, Alone(LENGTH, "contiguous"))
    wanted.backward(gradient)
    mine = q, k, v = [layout.shard(x.detach(), 2).requires_grad_() for x in alone]
    with traffic() as forward:
        out = scheme.attend(q, k, v, layout)
    with traffic() as backward:
        out.backward(layout.shard(gradient, 2))
    pairs = [(_gradient(a), layout.shard(_gradient(b), 2), _gradient(b)) for a, b in zip(mine, alone, strict=True)]
    return Found(
        _error(out, layout.shard(wanted, 2), wanted),
        max(_error(*pair) for pair in pairs),
        forward.bytes,
        backward.bytes,
    )


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _error(found: Tensor, wanted: Tensor, whole: Tensor) -> float:
    # A shard may be empty.
    gap = (found - wanted).abs().amax() if found.numel() else found.new_zeros(())
    return (gap / whole.abs().amax()).item()


def _begin() -> torch.device:
    gpu = torch.cuda.is_available()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "RANK" in os.environ:  # without torchrun a group of one, which needs no port
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=60))
    if not gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def main() -> int:
    """Prints a line for each scheme in process 0, the worst of all processes; 1 where one differs from one process."""
    device = _begin()
    at, wrong = place(None), []
    heads = at.size * max(1, 4 // at.size)
    if at.rank == 0:
        print(f"processes: {at.size}, each on {device.type}; {LENGTH} tokens, {heads} heads of {WIDTH}")
        print(f"{'scheme':26}{'output':>10}{'gradients':>11}{'sent forward':>14}{'backward':>11}  bytes of one process")
    for scheme in schemes(heads):
        found = measure(scheme, heads, device)
        here = torch.tensor([found.output, found.gradients, found.forward, found.backward], dtype=torch.float64)
        output, gradients, forward, backward = all_gather(here.to(device), at).amax(0).tolist()
        right = output < TOLERANCE and gradients < TOLERANCE
        wrong += [] if right else [scheme.name]
        if at.rank == 0:
            verdict = "equal" if right else "DIFFERS"
            print(f"{scheme.name:26}{output:10.1e}{gradients:11.1e}{forward:14,.0f}{backward:11,.0f}  {verdict}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
