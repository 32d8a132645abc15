"""Conditional attention against loops, and what the condition does to it."""

import pytest
import torch

from manyheads.mechanisms.pooling.conditional import ConditionalAttention


def build():
    torch.manual_seed(0)
    module = ConditionalAttention(4, side_dim=3).double()
    return module, torch.randn(2, 5, 4).double(), torch.randn(2, 3).double()


@torch.no_grad()
def test_equation():
    module, x, condition = build()
    real = torch.tensor([[True] * 5, [True, False, True, True, False]])
    result = module(x, mask=real, need_weights=True, condition=condition)
    for row in range(2):
        turn = (module.condition.weight[0] * condition[row]).sum()
        score = {t: ((module.word.weight[0] * x[row, t].tanh()).sum() * turn).exp() for t in range(5) if real[row, t]}
        pooled = sum(s / sum(score.values()) * x[row, t] for t, s in score.items())
        torch.testing.assert_close(result.output[row], torch.cat([pooled, condition[row]]))
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 1, 1).double())


@torch.no_grad()
def test_the_opposite_condition_turns_the_order_of_the_words_around_and_none_leaves_the_mean():
    module, x, condition = build()
    both = (module(x, need_weights=True, condition=c).weights for c in (condition, -condition))
    order, turned = (weights[0, 0, 0].argsort() for weights in both)
    assert order.tolist() == turned.flip(0).tolist()
    torch.testing.assert_close(module(x, condition=condition * 0).output[:, :4], x.mean(1))


def test_refusals():
    with pytest.raises(ValueError, match="side_dim=0"):
        ConditionalAttention(7, side_dim=0)
    with pytest.raises(ValueError, match="heads=1"):
        ConditionalAttention(7, 2)
    module, x, condition = build()
    with pytest.raises(ValueError, match=r"condition is \[1, 3\]; want \[2, 3\]"):
        module(x, condition=condition[:1])
