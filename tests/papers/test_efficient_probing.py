"""Efficient probing against loops, in the order of the paper: project every token, then pool."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.pooling.efficient_probing import EfficientProbing


def build(heads=3):
    torch.manual_seed(0)
    module = EfficientProbing(12, heads).double().eval()
    with torch.no_grad():
        module.queries.normal_()
    return module


def by_loops(module, x, real):
    (n, dim), heads = x.shape, module.heads
    values, width, y = x @ module.v_proj.weight.T, dim // heads, torch.zeros(dim, dtype=x.dtype)
    for m in range(heads):
        score = [(module.queries[m] * x[i]).sum() / dim**0.5 for i in range(n)]
        total = sum(score[i].exp() for i in range(n) if real[i])
        for i in range(n):
            if real[i]:
                y[m * width : (m + 1) * width] += score[i].exp() / total * values[i, m * width : (m + 1) * width]
    return y


@torch.no_grad()
def test_equation():
    module, x = build(), torch.randn(2, 7, 12).double()
    real = torch.tensor([[True] * 7, [True, False, True, True, False, True, False]])
    result = module(x, mask=real, need_weights=True)
    for row in range(2):
        torch.testing.assert_close(result.output[row], by_loops(module, x[row], real[row]))
    assert result.weights.shape == (2, 3, 1, 7)
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 3, 1).double())
    torch.testing.assert_close(result.weights[1, :, 0, ~real[1]], torch.zeros(3, 3).double())


@torch.no_grad()
def test_one_query_is_torch_attention_with_x_as_keys():
    module, x = build(heads=1), torch.randn(2, 5, 12).double()
    wanted = F.scaled_dot_product_attention(module.queries.expand(2, -1, -1), x, module.v_proj(x))
    torch.testing.assert_close(module(x).output, wanted[:, 0])


@torch.no_grad()
def test_zero_queries_average():
    module, x = build(), torch.randn(2, 5, 12).double()
    module.queries.zero_()
    torch.testing.assert_close(module(x).output, module.v_proj(x).mean(1))


def test_refuses_context_and_dense_masks():
    module, x = build(), torch.randn(2, 5, 12).double()
    with pytest.raises(ValueError, match="context"):
        module(x, x)
    with pytest.raises(ValueError, match="mask"):
        module(x, mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
