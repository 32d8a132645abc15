"""TAB (arXiv:2412.18675) against loops, its bounds, and edited attention."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.scoring.attention_bottleneck import AttentionBottleneck


def by_loops(module: AttentionBottleneck, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """cls [dim], patches [m, dim] -> y [dim] and the attention [h, m]."""
    d, mixed, rows = module.head_dim, [], []
    for h in range(module.heads):
        own = slice(h * d, (h + 1) * d)
        q = module.q_proj.weight[own] @ cls
        tokens = [cls, *patches]
        terms = [math.exp(float(q @ (module.k_proj.weight[own] @ token)) / math.sqrt(d)) for token in tokens]
        weights = torch.tensor([term / sum(terms) for term in terms[1:]], dtype=cls.dtype)
        rows.append(weights)
        mixed.append(weights @ (patches @ module.v_proj.weight[own].T))
    return module.o_proj.weight @ torch.cat(mixed), torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_pool_equals_loops(heads: int) -> None:
    module, x = AttentionBottleneck(12, heads).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    result = module(x, mask=mask, need_weights=True)
    for row, real in enumerate((6, 4)):
        output, weights = by_loops(module, x[row, 0], x[row, 1:real])
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row, :, 0, 1:real], weights)
    assert (result.weights[..., 0] == 0).all()
    assert (result.weights[1, ..., 4:] == 0).all()


@torch.no_grad()
def test_attention_over_patches_lies_between_nothing_and_one() -> None:
    module, x = AttentionBottleneck(12, 1).double(), torch.randn(1, 6, 12, dtype=torch.float64)
    total = module(x, need_weights=True).weights.sum()
    assert 0 < total < 1
    module.k_proj.weight.copy_(50 * module.q_proj.weight)
    alone = torch.cat((x[:, :1], -x[:, :1].expand(-1, 5, -1)), 1)
    result = module(alone, need_weights=True)
    torch.testing.assert_close(result.weights.sum(), torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.output, torch.zeros_like(result.output), atol=1e-5, rtol=0)


@torch.no_grad()
def test_edited_attention() -> None:
    module, x = AttentionBottleneck(12, 1).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    weights = module(x, need_weights=True).weights[..., 1:]
    torch.testing.assert_close(module.from_attention(weights, x[:, 1:])[:, 0], module(x).output)
    only_second = torch.zeros_like(weights)
    only_second[..., 1] = 1.0
    wanted = module.o_proj(module.v_proj(x[:, 2]))
    torch.testing.assert_close(module.from_attention(only_second, x[:, 1:])[:, 0], wanted)
    assert (module.from_attention(0 * weights, x[:, 1:]) == 0).all()
