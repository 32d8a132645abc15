"""Multi-scale self-attention (arXiv:1912.00544) against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.multi_scale import MultiScale


def loops(module: MultiScale, x: Tensor) -> Tensor:
    n, d, rows = len(x), module.head_dim, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    for i in range(n):
        mixed = []
        for h, scale in enumerate(module.scales):
            side = scale if scale >= 1 else max(1, math.floor(scale * n))
            seen = [j for j in range(n) if i - side <= j <= i + side]
            scores = [math.exp(float(q[h][i] @ k[h][j]) / math.sqrt(d)) for j in seen]
            mixed.append(sum(s * v[h][j] for s, j in zip(scores, seen, strict=True)) / sum(scores))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 17, 70])
def test_equals_loops(n: int) -> None:
    module = MultiScale(16, 4, scales=[1, 3, 1 / 16, 0.25]).double()
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_the_share_is_of_the_real_length() -> None:
    module = MultiScale(16, 2, scales=[0.25, 0.5])
    mask = torch.arange(40)[None] < torch.tensor([[16], [40]])
    weights = module(torch.randn(2, 40, 16), mask=mask, need_weights=True).weights
    assert weights is not None
    assert (weights[:, :, 8] > 0).sum(-1).tolist() == [[9, 16], [19, 29]]


def test_wide_scales_are_plain_attention() -> None:
    module, plain = MultiScale(16, 4, scales=[19, 20, 30, 99]).double(), Softmax(16, 4).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_default_scales_are_dealt_out_evenly() -> None:
    assert MultiScale(20, 10).scales == [1, 1, 3, 3, 1 / 16, 1 / 16, 1 / 8, 1 / 8, 1 / 4, 1 / 4]


@pytest.mark.parametrize("scales", [[1, 2], [1, 2, 3, 0], [1, 2, 3, 1.5]])
def test_refuses(scales: list[float]) -> None:
    with pytest.raises(ValueError, match="one per head"):
        MultiScale(16, 4, scales=scales)
