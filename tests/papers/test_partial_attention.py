"""Partial attention: two attentions as loops, the second one to the source alone."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.projection.partial_attention import PartialAttention

close = torch.testing.assert_close


def linear(layer: torch.nn.Linear, rows: Tensor) -> Tensor:
    return rows @ layer.weight.T + layer.bias


def attention(part: torch.nn.Module, queries: Tensor, source: Tensor, reach: list[int], heads: int) -> Tensor:
    """Query i sees the first reach[i] rows of the source."""
    q, k, v = linear(part.q_proj, queries), linear(part.k_proj, source), linear(part.v_proj, source)
    d, mixed = q.shape[1] // heads, torch.zeros_like(q)
    for i, seen in enumerate(reach):
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            powers = [math.exp(float(q[i, own] @ k[j, own]) / math.sqrt(d)) for j in range(seen)]
            for j, power in enumerate(powers):
                mixed[i, own] += power / sum(powers) * v[j, own]
    return linear(part.o_proj, mixed)


def loops(module: PartialAttention, x: Tensor) -> Tensor:
    n, size = len(x), module.source_length
    first = attention(module.attention, x, x, [i + 1 for i in range(n)], module.heads)
    stream = x + first
    spread = (stream - stream.mean(1, keepdim=True)) / (stream.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    inner, outer = module.source_map[0], module.source_map[2]
    source = linear(outer, linear(inner, x[:size]).tanh())
    query = spread * module.norm.weight + module.norm.bias
    return first + attention(module.partial, query, source, [min(i + 1, size) for i in range(n)], module.heads)


def _module(source_length: int) -> PartialAttention:
    torch.manual_seed(0)
    return PartialAttention(12, 3, source_length=source_length).double()


@pytest.mark.parametrize("source_length", [1, 3, 50])
@torch.no_grad()
def test_equals_loops(source_length: int) -> None:
    module, x = _module(source_length), torch.randn(1, 7, 12, dtype=torch.float64)
    close(module(x).output[0], loops(module, x[0]), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_left_padding_moves_the_source() -> None:
    """Rows of a batch have their sources at different columns; chunks may cut them."""
    module, x = _module(3), torch.randn(2, 8, 12, dtype=torch.float64)
    mask = torch.arange(8)[None] >= torch.tensor([[3], [0]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = [loops(module, x[0, 3:]), loops(module, x[1])]
    for chunks in ([8], [2, 2, 4], [1] * 8):
        state, parts, start = module.init_state(2), [], 0
        for size in chunks:
            now = slice(start, start + size)
            parts.append(module(x[:, now], mask=mask[:, now], positions=positions[:, now], state=state).output)
            start += size
        output = torch.cat(parts, 1)
        close(output[0, 3:], wanted[0], rtol=1e-11, atol=1e-11)
        close(output[1], wanted[1], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_source_keeps_half_of_the_weight() -> None:
    """The claim: however long the target grows, half of the two matrices' mean stays with the source."""
    module, x = _module(2), torch.randn(1, 30, 12, dtype=torch.float64)
    weights = module(x, need_weights=True).weights
    close(weights.sum(-1), torch.ones(1, 3, 30, dtype=torch.float64))
    assert bool((weights[..., :2].sum(-1) > 0.5).all())


@torch.no_grad()
def test_the_state_holds_the_source_once() -> None:
    module, x = _module(3), torch.randn(1, 9, 12, dtype=torch.float64)
    state = module.init_state(1)
    for i in range(9):
        module(x[:, i : i + 1], state=state)
    assert len(state.grown["source_keys"]) == 3
    assert len(state.grown["keys"]) == 9


@torch.no_grad()
def test_a_context_is_the_source_before_the_targets() -> None:
    """Targets come out as those of one sequence, context first; the context is seen whole and may be padded."""
    module, x = _module(3), torch.randn(2, 5, 12, dtype=torch.float64)
    context = torch.randn(2, 4, 12, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, True, False]])
    result = module(x, torch.where(mask[..., None], context, 1e3), mask=mask, need_weights=True)
    for row in range(2):
        source = context[row, mask[row]]
        module.source_length = len(source)
        wanted = loops(module, torch.cat([source, x[row]]))[len(source) :]
        close(result.output[row], wanted, rtol=1e-11, atol=1e-11)
        whole = module(torch.cat([source, x[row]])[None], need_weights=True).weights[0, :, len(source) :]
        close(result.weights[row][..., mask[row]], whole[..., : len(source)], rtol=1e-11, atol=1e-11)
    state = module.init_state(2)
    steps = [module(x[:, i : i + 1], context, mask=mask, state=state).output for i in range(5)]
    close(torch.cat(steps, 1), result.output, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="made for a context of 4 tokens, this one has 3"):
        module(x[:, :1], context[:, :3], state=state)


@torch.no_grad()
def test_the_source_is_what_kinds_say() -> None:
    """Each row has a source of its own length; padding on the left may be of any kind, and chunks may cut it."""
    module, x = _module(50), torch.randn(3, 8, 12, dtype=torch.float64)
    lengths, pads = [3, 5, 1], [2, 0, 1]
    kinds, mask = torch.ones(3, 8, dtype=torch.long), torch.ones(3, 8, dtype=torch.bool)
    wanted = []
    for row, (length, pad) in enumerate(zip(lengths, pads, strict=True)):
        mask[row, :pad], kinds[row, : pad + length] = False, 0
        module.source_length = length
        wanted.append(loops(module, x[row, pad:]))
    module.source_length = 50
    for chunks in ([8], [2, 2, 4], [1] * 8):
        state, parts, start = module.init_state(3), [], 0
        for size in chunks:
            now = slice(start, start + size)
            parts.append(module(x[:, now], mask=mask[:, now], token_kinds=kinds[:, now], state=state).output)
            start += size
        for row, pad in enumerate(pads):
            close(torch.cat(parts, 1)[row, pad:], wanted[row], rtol=1e-11, atol=1e-11)


def test_kinds_that_do_not_fit_are_refused() -> None:
    module, x = PartialAttention(8, 2), torch.randn(1, 4, 8)
    source, target = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    state = module.init_state(1)
    module(x, token_kinds=source, state=state)
    with pytest.raises(ValueError, match="in some passes of a state only"):
        module(x, state=state)
    module(x, token_kinds=target, state=state)
    with pytest.raises(ValueError, match="token_kinds came back to 0 after the target had begun"):
        module(x, token_kinds=source, state=state)
    state = module.init_state(1)
    module(x, state=state)
    with pytest.raises(ValueError, match="in some passes of a state only"):
        module(x, token_kinds=target, state=state)
    with pytest.raises(ValueError, match="a context is the source; leave token_kinds out"):
        module(x, x, token_kinds=source)
    with pytest.raises(ValueError, match=r"token_kinds are torch\.float32"):
        module(x, token_kinds=source.float())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="source_length=0"):
        PartialAttention(8, 2, source_length=0)
    module = PartialAttention(8, 2, source_length=2)
    state, x = module.init_state(1), torch.randn(1, 4, 8)
    module(x, positions=torch.arange(4), state=state)
    module(x, positions=torch.arange(4, 8), state=state)
    with pytest.raises(ValueError, match="a state takes one source"):
        module(x, positions=torch.arange(4), state=state)
