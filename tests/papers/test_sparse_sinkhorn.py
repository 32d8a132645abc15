"""Sparse Sinkhorn attention (arXiv:2002.11296) against loops over blocks."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.scoring.sparse_sinkhorn import SparseSinkhorn

D = 4


def order_of(q: list[Tensor], k: list[Tensor], temperature: float, iterations: int) -> Tensor:
    c = len(q)
    cells = [[max(float(a.mean(0) @ b.mean(0)) / math.sqrt(D), 0.0) for b in k] for a in q]
    cells = [[(cell + 1e-6) ** (1 / temperature) for cell in row] for row in cells]
    for _ in range(iterations):
        cells = [[cell / sum(row) for cell in row] for row in cells]
        for j in range(c):
            total = sum(row[j] for row in cells)
            for row in cells:
                row[j] /= total
    return torch.tensor(cells, dtype=torch.float64)


def by_loops(module: SparseSinkhorn, x: Tensor) -> tuple[Tensor, Tensor]:
    n, s = len(x), module.block
    matrix, mixed = torch.zeros(3, n, n, dtype=x.dtype), torch.zeros(n, 12, dtype=x.dtype)
    for h in range(3):
        own = slice(D * h, D * h + D)
        q, k, v = (x @ p.weight[own].T for p in (module.q_proj, module.k_proj, module.v_proj))
        blocks = [range(start, min(start + s, n)) for start in range(0, n, s)]
        order = order_of(
            [q[list(b)] for b in blocks], [k[list(b)] for b in blocks], module.temperature, module.iterations
        )
        for index, block in enumerate(blocks):
            for i in block:
                scores = [math.exp(float(q[i] @ k[j]) / math.sqrt(D)) for j in block]
                for slot in range(min(s, n)):
                    key = sum(order[index, j] * k[other[slot]] for j, other in enumerate(blocks) if slot < len(other))
                    scores.append(math.exp(float(q[i] @ key) / math.sqrt(D)))
                weights = [score / sum(scores) for score in scores]
                for j, weight in zip(block, weights, strict=False):
                    matrix[h, i, j] += weight
                for slot, weight in enumerate(weights[len(block) :]):
                    for j, other in enumerate(blocks):
                        if slot < len(other):
                            matrix[h, i, other[slot]] += weight * order[index, j]
        mixed[:, own] = matrix[h] @ v
    return mixed @ module.o_proj.weight.T, matrix


@pytest.mark.parametrize("n", [1, 3, 8, 10])
@torch.no_grad()
def test_equals_loops(n: int) -> None:
    module = SparseSinkhorn(12, 3, block=4, iterations=3).double().eval()
    x = torch.randn(2, n, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    for row in range(2):
        output, matrix = by_loops(module, x[row])
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row], matrix)


@torch.no_grad()
def test_every_block_is_given_away_whole() -> None:
    """Columns come last: after one round already they sum to 1, and rows do not. With padding the same."""
    module = SparseSinkhorn(12, 3, block=4, iterations=1).double().eval()
    q, k = torch.randn(2, 2, 3, 5, 4, D, dtype=torch.float64)
    real = torch.ones(2, 5, 4, dtype=torch.bool)
    real[1, 3:] = False
    for given in (None, real):
        order = module._order(*(t.masked_fill(~real[:, None, ..., None], 0.0) for t in (q, k)), given)
        count = 5 if given is None else 3
        torch.testing.assert_close(order.sum(2)[1, :, :count], torch.ones(3, count, dtype=torch.float64))
        assert (order.sum(3)[1, :, :count] - 1).abs().max() > 1e-3


@torch.no_grad()
def test_one_block_meets_itself_twice_and_is_plain_attention() -> None:
    module, plain = SparseSinkhorn(12, 3, block=16).double().eval(), Softmax(12, 3).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


@torch.no_grad()
def test_noise_in_training_only() -> None:
    module, x = SparseSinkhorn(12, 3, block=4), torch.randn(1, 12, 12)
    assert not torch.equal(module.train()(x).output, module(x).output)
    assert torch.equal(module.eval()(x).output, module(x).output)


def test_no_block() -> None:
    with pytest.raises(ValueError, match="block=0"):
        SparseSinkhorn(12, 3, block=0)
