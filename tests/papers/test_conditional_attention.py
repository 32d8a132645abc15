"""Conditional attention against loops, and what the condition does to it."""

import pytest
import torch

from manyheads.mechanisms.pooling.conditional import ConditionalAttention


def build():
    torch.manual_seed(0)
    module, x = ConditionalAttention(7, side_dim=3).double(), torch.randn(2, 5, 7).double()
    x[..., 4:] = x[:, :1, 4:]
    return module, x


@torch.no_grad()
def test_equation():
    module, x = build()
    real = torch.tensor([[True] * 5, [True, False, True, True, False]])
    result = module(x, mask=real, need_weights=True)
    for row in range(2):
        turn = (module.condition.weight[0] * x[row, 0, 4:]).sum()
        score = {
            t: ((module.word.weight[0] * x[row, t, :4].tanh()).sum() * turn).exp() for t in range(5) if real[row, t]
        }
        pooled = sum(s / sum(score.values()) * x[row, t, :4] for t, s in score.items())
        torch.testing.assert_close(result.output[row], torch.cat([pooled, x[row, 0, 4:]]))
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 1, 1).double())


@torch.no_grad()
def test_the_opposite_condition_turns_the_order_of_the_words_around_and_none_leaves_the_mean():
    module, x = build()
    other = torch.cat([x[..., :4], -x[..., 4:]], -1)
    order, turned = (module(t, need_weights=True).weights[0, 0, 0].argsort() for t in (x, other))
    assert order.tolist() == turned.flip(0).tolist()
    x[..., 4:] = 0
    torch.testing.assert_close(module(x).output, x.mean(1))


def test_refusals():
    with pytest.raises(ValueError, match="side_dim=7"):
        ConditionalAttention(7, side_dim=7)
    with pytest.raises(ValueError, match="heads=1"):
        ConditionalAttention(7, 2)
