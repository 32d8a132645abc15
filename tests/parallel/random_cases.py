"""What every process of a group holds at lengths, masks, groups of heads and dtypes that are drawn, for any number."""

import functools
import random

import ring_cases
import state_cases
import torch
import torch.distributed as dist
from torch.testing import assert_close

from manyheads.parallel import Layout, heads_attention, windowed_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def drawn_for(number: int) -> random.Random:
    return random.Random(f"{number} of {dist.get_world_size()}")


def ring(number: int) -> None:
    draw = drawn_for(number)
    causal = draw.random() < 0.7
    window = draw.choice([None, 1, 5, 40]) if causal else None
    grouped = draw.choice([(4, 4), (4, 1), (6, 2)])
    ring_cases.equal(
        1000 * number, draw.randint(1, 45), causal=causal, window=window, padded=draw.random() < 0.5,
        packed=draw.random() < 0.5, kind=draw.choice(["zigzag", "contiguous"]), heads=grouped,
        dtype=draw.choice(DTYPES),
    )  # fmt: skip


def heads(number: int) -> None:
    draw, size = drawn_for(number), dist.get_world_size()
    ring_cases.equal(
        2000 * number, draw.randint(1, 30), padded=draw.random() < 0.5, heads=(2 * size, size),
        dtype=draw.choice(DTYPES), scheme=heads_attention,
    )  # fmt: skip


def states(number: int) -> None:
    draw = drawn_for(number)
    causal = draw.random() < 0.7
    kernel = draw.choice([state_cases.SUMMED, state_cases.DIVIDED, state_cases.TAYLOR])
    decays = causal and kernel is not state_cases.TAYLOR and draw.random() < 0.5
    state_cases.equal(
        3000 * number, draw.randint(1, 20), kernel, causal=causal, decays=decays, padded=draw.random() < 0.5
    )


def windows(number: int) -> None:
    """Against ring attention's own reference, with the gradients of the tokens in front."""
    draw = drawn_for(number)
    n, window = draw.randint(1, 40), draw.choice([1, 3, 17])
    whole = [ring_cases.drawn(4000 * number + i, 2, 3, n, 4).requires_grad_() for i in range(3)]
    mask = ring_cases.allowed(2, n, causal=True, window=window, padding=None, documents=None)
    wanted = ring_cases.one_process(*whole, mask, 0.5)
    gradient = ring_cases.drawn(4000 * number + 3, *wanted.shape)
    wanted.backward(gradient)
    layout = Layout(n, "contiguous")
    mine = [layout.shard(x.detach(), 2).requires_grad_() for x in whole]
    out = windowed_attention(*mine, layout, [window] * 3, scale=0.5)
    out.backward(layout.shard(gradient, 2))
    assert_close(out, layout.shard(wanted, 2).detach())
    for found, expected in zip(mine, whole, strict=True):
        assert_close(found.grad, layout.shard(expected.grad, 2))


SCHEMES = {"ring": (ring, 6), "heads": (heads, 3), "states": (states, 4), "windows": (windows, 3)}
CASES = {
    f"{name} {number}": functools.partial(case, number)
    for name, (case, count) in SCHEMES.items()
    for number in range(count)
}
