"""Set Transformer (arXiv:1810.00825) against loops over heads and tokens."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.tokens.set_transformer import AttentionBlock, AttentionPooling, InducedSetAttention


def linear(layer: torch.nn.Linear, row: Tensor) -> Tensor:
    return layer.weight @ row + layer.bias


def normed(layer: torch.nn.Module, row: Tensor) -> Tensor:
    if isinstance(layer, torch.nn.Identity):
        return row
    return (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt() * layer.weight + layer.bias


def block_by_loops(block: AttentionBlock, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dim = x.shape[1]
    d = dim // block.heads
    rows, matrix = [], torch.zeros(block.heads, len(x), len(y), dtype=x.dtype)
    for i in range(len(x)):
        q = linear(block.q_proj, x[i])
        mixed = q.clone()
        for h in range(block.heads):
            part = slice(h * d, (h + 1) * d)
            terms = [math.exp(float(q[part] @ linear(block.k_proj, row)[part]) / math.sqrt(dim)) for row in y]
            for j, term in enumerate(terms):
                matrix[h, i, j] = term / sum(terms)
                mixed[part] += matrix[h, i, j] * linear(block.v_proj, y[j])[part]
        hidden = normed(block.first_norm, mixed)
        rows.append(normed(block.second_norm, hidden + linear(block.o_proj, hidden).clamp(min=0)))
    return torch.stack(rows), matrix


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("points", "n", "m"), [(3, 5, None), (1, 2, None), (20, 4, 7)])
@torch.no_grad()
def test_induced_points_equal_loops(norm: bool, points: int, n: int, m: int | None) -> None:
    module = InducedSetAttention(12, 3, points=points, norm=norm).double()
    x = torch.randn(2, n, 12, dtype=torch.float64)
    context = None if m is None else torch.randn(2, m, 12, dtype=torch.float64)
    result = module(x, context, need_weights=True)
    for row in range(2):
        hidden, gathered = block_by_loops(module.gather, module.points, (x if context is None else context)[row])
        output, spread = block_by_loops(module.spread, x[row], hidden)
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row], spread @ gathered)


@pytest.mark.parametrize("feed_forward", [False, True])
@torch.no_grad()
def test_pooling_equals_loops(feed_forward: bool) -> None:
    module = AttentionPooling(12, 3, feed_forward=feed_forward, norm=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    for row in range(2):
        tokens = x[row]
        if feed_forward:
            tokens = torch.stack([linear(module.feed_forward, token).clamp(min=0) for token in tokens])
        output, weights = block_by_loops(module.pool, module.seed, tokens)
        torch.testing.assert_close(result.output[row], output[0])
        torch.testing.assert_close(result.weights[row], weights)


@torch.no_grad()
def test_order_does_not_matter() -> None:
    x, order = torch.randn(2, 9, 16, dtype=torch.float64), torch.randperm(9)
    induced, pool = InducedSetAttention(16, 4, points=4).double(), AttentionPooling(16, 4).double()
    torch.testing.assert_close(induced(x[:, order]).output, induced(x).output[:, order])
    torch.testing.assert_close(pool(x[:, order]).output, pool(x).output)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="points=0"):
        InducedSetAttention(16, 4, points=0)
    with pytest.raises(ValueError, match="dense mask"):
        InducedSetAttention(16, 4)(torch.randn(1, 3, 16), mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
