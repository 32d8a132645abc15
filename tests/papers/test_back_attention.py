"""Back attention as loops, what each half of x does, and the case where both halves are one stream."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads import create_attention
from manyheads.mechanisms.recurrent.back_attention import BackAttention


def built(dim: int = 8, side_dim: int | None = 6, **config: object) -> BackAttention:
    torch.manual_seed(0)
    return BackAttention(dim, 2, side_dim=side_dim, **config).double()


def tokens(n: int) -> tuple[Tensor, Tensor]:
    """Of the lower layer and of the higher."""
    both = torch.randn(2, n, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return both[..., :8], both[..., 8:]


def by_loops(module: BackAttention, low: Tensor, high: Tensor) -> Tensor:
    q, k, v = low @ module.q_proj.weight.T, high @ module.k_proj.weight.T, high @ module.v_proj.weight.T
    out = torch.zeros_like(low)
    for b in range(2):
        for i in range(low.shape[1]):
            for h in range(2):
                part = slice(4 * h, 4 * h + 4)
                shares = [math.exp(float(q[b, i, part] @ k[b, j, part]) / 2) for j in range(i + 1)]
                for j, share in enumerate(shares):
                    out[b, i, part] += share / sum(shares) * v[b, j, part]
    return out @ module.o_proj.weight.T


@torch.no_grad()
def test_equals_the_equation() -> None:
    module, (low, high) = built(), tokens(7)
    assert_close(module(low, higher=high).output, by_loops(module, low, high))
    assert_close(module(low, higher=high, need_weights=True).output, by_loops(module, low, high))


@torch.no_grad()
def test_queries_come_from_below_and_keys_and_values_from_above() -> None:
    module, (low, high) = built(), tokens(6)
    clean = module(low, higher=high, need_weights=True)
    below, above = low.clone(), high.clone()
    below[:, 2] += 1.0
    above[:, 2] += 1.0
    moved = (module(below, higher=high, need_weights=True).weights - clean.weights).abs().amax((0, 1, 3))
    assert moved[2] > 1e-3
    assert_close(moved[[0, 1, 3, 4, 5]], torch.zeros(5, dtype=torch.float64))
    moved = (module(low, higher=above).output - clean.output).abs().amax((0, 2))
    assert (moved[2:] > 1e-4).all()
    assert_close(moved[:2], torch.zeros(2, dtype=torch.float64))


@torch.no_grad()
def test_a_stream_beside_itself_is_plain_attention() -> None:
    rotary = {"base": 100.0}
    module, (x, _) = built(8, None, rotary=rotary), tokens(6)
    plain = create_attention("softmax", 8, 2, causal=True, rotary=rotary).double()
    plain.load_state_dict(module.state_dict())
    assert_close(module(x, higher=x).output, plain(x).output)


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert built(8, None).side_dim == 8
    with pytest.raises(ValueError, match="back-attention: side_dim=0"):
        built(8, 0)
    module, (low, high) = built(), tokens(6)
    with pytest.raises(ValueError, match=r"higher is \[2, 5, 6\] on cpu; want \[2, 6, 6\]"):
        module(low, higher=high[:, 1:])
    with pytest.raises(ValueError, match=r"\['higher'\] missing"):
        module(low)
