"""Multi-window attention (arXiv:2306.00561) against loops over windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.multi_window import MultiWindow
from manyheads.testing import LargestTensor


def loops(module: MultiWindow, x: Tensor) -> Tensor:
    n, d = len(x), module.head_dim
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    mixed, tables = [], list(module.relative)
    for h, window in enumerate(module.windows):
        size, table, rows = window or n, tables.pop(0) if window else None, torch.zeros(n, d, dtype=x.dtype)
        for start in range(0, n, size):
            members = range(start, min(start + size, n))
            for i in members:
                bias = [0.0 if table is None else float(table[i - j + window - 1]) for j in members]
                scores = [float(q[h][i] @ k[h][j]) / math.sqrt(d) + b for j, b in zip(members, bias, strict=True)]
                total = sum(math.exp(s) for s in scores)
                for j, s in zip(members, scores, strict=True):
                    rows[i] += math.exp(s) / total * v[h][j]
        mixed.append(rows)
    return torch.cat(mixed, -1) @ module.o_proj.weight.T


@pytest.mark.parametrize("n", [20, 23, 3])
def test_equals_loops(n: int) -> None:
    module = MultiWindow(16, 4, windows=[2, 5, 10, 0]).double()
    for table in module.relative:
        torch.nn.init.normal_(table)
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_default_windows_grow_and_end_global() -> None:
    assert MultiWindow(16, 8).windows == [2, 4, 8, 16, 32, 64, 0, 0]
    assert MultiWindow(16, 1).windows == [0]
    assert max(MultiWindow(32, 32).windows) == 512  # a bias of 2 w - 1 numbers each: no doubling without end


def test_without_biases_a_window_of_the_whole_length_is_plain_attention() -> None:
    module, plain = MultiWindow(16, 4, windows=[20, 40, 21, 0]).double(), Softmax(16, 4).double()
    for table in module.relative:
        torch.nn.init.zeros_(table)
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if "relative" not in name})
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_windows_do_not_overlap() -> None:
    weights = MultiWindow(16, 2, windows=[4, 0])(torch.randn(1, 12, 16), need_weights=True).weights
    assert weights is not None
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert torch.equal(weights[0, 0] > 0, blocks)
    assert (weights[0, 1] > 0).all()


def test_padding_makes_no_square_matrix() -> None:
    n = 2048
    with LargestTensor() as largest, torch.no_grad():
        MultiWindow(16, 4)(torch.randn(1, n, 16), mask=torch.arange(n)[None] < n - 5)
    assert largest.size <= n * 64


@pytest.mark.parametrize("windows", [[2, 2], [2, 2, -1, 0]])
def test_refuses(windows: list[int]) -> None:
    with pytest.raises(ValueError, match="one size per head"):
        MultiWindow(16, 4, windows=windows)
