"""TransICD's code-wise attention against loops over labels and tokens."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.pooling.code_wise import CodeWise
from manyheads.testing import LargestTensor


def by_loops(module, labels, tokens, allowed):
    y = torch.zeros_like(labels)
    for i in range(len(labels)):
        score = {
            t: (labels[i] * torch.tanh(module.w_proj.weight @ tokens[t] + module.w_proj.bias)).sum().exp()
            for t in range(len(tokens))
            if allowed[i][t]
        }
        for t, s in score.items():
            y[i] += s / sum(score.values()) * tokens[t]
    return y


@torch.no_grad()
def test_equation_with_padding_and_dense_masks():
    torch.manual_seed(0)
    module, x, context = CodeWise(6).double(), torch.randn(2, 3, 6).double(), torch.randn(2, 5, 6).double()
    padding = torch.tensor([[True] * 5, [False, True, True, False, True]])
    dense = torch.rand(2, 1, 3, 5) > 0.3
    dense[..., 0] = True
    by_padding, by_dense = module(x, context, mask=padding, need_weights=True), module(x, context, mask=dense)
    for row in range(2):
        torch.testing.assert_close(
            by_padding.output[row], by_loops(module, x[row], context[row], padding[row].expand(3, -1))
        )
        torch.testing.assert_close(by_dense.output[row], by_loops(module, x[row], context[row], dense[row, 0]))
    torch.testing.assert_close(by_padding.weights.sum(-1), torch.ones(2, 1, 3).double())


@torch.no_grad()
def test_is_torch_attention_with_tanh_keys_and_unprojected_values():
    module, x, context = CodeWise(6).double(), torch.randn(2, 3, 6).double(), torch.randn(2, 5, 6).double()
    wanted = F.scaled_dot_product_attention(x, torch.tanh(module.w_proj(context)), context, scale=1.0)
    torch.testing.assert_close(module(x, context).output, wanted)


@torch.no_grad()
def test_labels_do_not_see_each_other():
    module, x, context = CodeWise(6).double(), torch.randn(2, 3, 6).double(), torch.randn(2, 5, 6).double()
    torch.testing.assert_close(module(x, context).output[:, 1:2], module(x[:, 1:2], context).output)


@torch.no_grad()
def test_many_labels_hold_no_matrix():
    with LargestTensor() as largest:
        CodeWise(6).double()(torch.randn(1, 500, 6).double(), torch.randn(1, 400, 6).double())
    assert largest.size < 500 * 400 / 10


def test_refuses_more_heads():
    with pytest.raises(ValueError, match="heads=1"):
        CodeWise(6, 2)
