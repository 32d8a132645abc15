"""Neighborhood attention (arXiv:2204.07143, arXiv:2209.15001, arXiv:2403.04690) against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.neighborhood import Neighborhood
from manyheads.testing import check_mechanism


def neighbours(i: int, n: int, window: int, dilation: int, causal: bool, stride: int = 1) -> list[int]:
    """Subsequence, place in it, the leader of its group, window moved inward at the ends."""
    line = list(range(i % dilation, n, dilation))
    place = line.index(i)
    group = place // stride * stride
    if causal:
        return line[max(0, group + stride - window) : place + 1]
    leader = min(group + stride // 2, len(line) - 1)
    first = max(0, min(leader - window // 2, len(line) - window))
    return line[first : first + window]


def loops(module: Neighborhood, x: Tensor) -> Tensor:
    d, rows = module.head_dim, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    for i in range(len(x)):
        seen, mixed = neighbours(i, len(x), module.window, module.dilation, module.causal, module.stride), []
        for h in range(module.heads):
            scores = [math.exp(float(q[h][i] @ k[h][j]) / math.sqrt(d)) for j in seen]
            mixed.append(sum(s * v[h][j] for s, j in zip(scores, seen, strict=True)) / sum(scores))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("window", "dilation", "stride", "n"),
    [
        (5, 1, 1, 23),
        (4, 1, 1, 9),
        (3, 3, 1, 20),
        (5, 4, 1, 13),
        (2, 1, 1, 70),
        (5, 1, 2, 23),
        (4, 1, 4, 70),
        (7, 1, 6, 150),
        (4, 3, 3, 47),
        (3, 5, 2, 4),
    ],
)
def test_equals_loops(window: int, dilation: int, stride: int, n: int, causal: bool) -> None:
    module = Neighborhood(16, 4, window=window, dilation=dilation, stride=stride, causal=causal).double()
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_a_border_token_still_sees_a_whole_window() -> None:
    weights = Neighborhood(16, 2, window=5)(torch.randn(1, 11, 16), need_weights=True).weights
    assert weights is not None
    assert (weights > 0).sum(-1).eq(5).all()
    assert (weights[0, 0, 0, :5] > 0).all()
    assert (weights[0, 0, 10, 6:] > 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_wide_window_is_plain_attention(causal: bool) -> None:
    module, plain = Neighborhood(16, 4, window=30, causal=causal).double(), Softmax(16, 4, causal=causal).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


@pytest.mark.parametrize("config", [{"window": 3, "dilation": 2}, {"window": 4, "dilation": 2, "stride": 3}])
@pytest.mark.parametrize("causal", [False, True])
def test_dilated_conformance(causal: bool, config: dict[str, int]) -> None:
    names = ["decode", "decode-padded", "padding", "left-padding", "weights", "gradcheck", "no-future", "reorder"]
    check_mechanism(
        Neighborhood,
        config=config,
        properties=names,
        patterns=["causal-self" if causal else "noncausal-self"],
    )


def test_strided_conformance() -> None:
    check_mechanism(Neighborhood, config={"window": 5, "stride": 3})


def natten(i: int, j: int, n: int, window: int, dilation: int, stride: int, causal: bool) -> bool:
    """May i see j, in the words of NATTEN's masks: a leader, and the window about its clamped place."""
    if i % dilation != j % dilation:
        return False
    length = len(range(i % dilation, n, dilation))
    i, j = i // dilation, j // dilation
    if causal:
        return j <= i and min(i // stride * stride + stride - 1, length - 1) - j < window
    left, right = window // 2, window // 2 + (window % 2 - 1)
    leader = min(i // stride * stride + stride // 2, length - 1)
    centre = max(left, min(leader, length - 1 - right))
    return centre - left <= j <= centre + right


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("window", "dilation", "stride", "n"), [(5, 1, 2, 24), (4, 1, 4, 24), (6, 2, 3, 30), (4, 3, 2, 36)]
)
def test_windows_are_those_of_natten(window: int, dilation: int, stride: int, n: int, causal: bool) -> None:
    """Causal groups are whole here: where the length cuts one, see the docstring."""
    module = Neighborhood(16, 2, window=window, dilation=dilation, stride=stride, causal=causal)
    weights = module(torch.randn(1, n, 16), need_weights=True).weights
    wanted = [[natten(i, j, n, window, dilation, stride, causal) for j in range(n)] for i in range(n)]
    assert (weights[0, 0] > 0).tolist() == wanted


def test_left_padding_moves_no_window() -> None:
    module = Neighborhood(16, 4, window=3, dilation=2).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    dirty = torch.cat([torch.full((1, 3, 16), 1e3, dtype=torch.float64), x], 1)
    mask = torch.arange(15)[None] >= 3
    for need in (False, True):
        torch.testing.assert_close(module(dirty, mask=mask, need_weights=need).output[:, 3:], module(x).output)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Neighborhood(16, 4, window=0)
    with pytest.raises(ValueError, match="stride=4 with window=3"):
        Neighborhood(16, 4, window=3, stride=4)
