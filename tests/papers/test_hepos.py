"""Head-wise positional strides (arXiv:2104.02112) against loops over heads and source tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.hepos import Hepos
from manyheads.testing import LargestTensor


def loops(module: Hepos, x: Tensor, source: Tensor) -> Tensor:
    d, heads = module.head_dim, []
    q = (x @ module.q_proj.weight.T).split(d, -1)
    k, v = ((source @ p.weight.T).split(d, -1) for p in (module.k_proj, module.v_proj))
    for h in range(module.heads):
        seen = list(range(h % module.stride, len(source), module.stride))
        rows = torch.zeros_like(q[h])
        for i in range(len(x) if seen else 0):
            scores = [math.exp(float(q[h][i] @ k[h][j]) / math.sqrt(d)) for j in seen]
            rows[i] = sum(s * v[h][j] for s, j in zip(scores, seen, strict=True)) / sum(scores)
        heads.append(rows)
    return torch.cat(heads, -1) @ module.o_proj.weight.T


@pytest.mark.parametrize(("stride", "m"), [(2, 13), (3, 12), (4, 3), (1, 5), (4, 40)])
def test_equals_loops(stride: int, m: int) -> None:
    module = Hepos(16, 4, stride=stride).double()
    x, source = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, m, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, *pair) for pair in zip(x, source, strict=True)])
        torch.testing.assert_close(module(x, source).output, wanted)
        torch.testing.assert_close(module(x, source, need_weights=True).output, wanted)


def test_stride_heads_read_the_source_once() -> None:
    weights = Hepos(16, 4, stride=4)(torch.randn(1, 3, 16), torch.randn(1, 22, 16), need_weights=True).weights
    assert weights is not None
    assert ((weights > 0).sum(1) == 1).all()


def test_stride_one_is_plain_cross_attention() -> None:
    module, plain = Hepos(16, 4, stride=1).double(), Softmax(16, 4).double()
    plain.load_state_dict(module.state_dict())
    x, source = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x, source).output, plain(x, source).output)


def test_padding_makes_no_matrix_of_queries_and_keys() -> None:
    n = 1024
    with LargestTensor() as largest, torch.no_grad():
        Hepos(16, 4)(torch.randn(1, n, 16), torch.randn(1, n, 16), mask=torch.arange(n)[None] < n - 5)
    assert largest.size <= n * 64


@pytest.mark.parametrize("stride", [0, 5])
def test_refuses(stride: int) -> None:
    with pytest.raises(ValueError, match="stride <= heads"):
        Hepos(16, 4, stride=stride)
