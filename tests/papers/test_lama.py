"""LAMA against loops over heads and words."""

import pytest
import torch

from manyheads.mechanisms.pooling.lama import Lama


def by_loops(module, x, real):
    words = [t for t in range(len(x)) if real[t]]
    mean = sum(x[t] for t in words) / len(words)
    p, q, heads = module.p_proj.weight, module.q_proj.weight, module.heads
    scores = {}
    for t in words:
        raw = [torch.tanh((p[h] * mean).sum() * (q[h] * x[t]).sum()) for h in range(heads)]
        norm = sum(r * r for r in raw) ** 0.5
        scores[t] = [r / norm for r in raw]
    heads_out = []
    for h in range(heads):
        total = sum(scores[t][h].exp() for t in words)
        heads_out.append(sum(scores[t][h].exp() / total * x[t] for t in words))
    return module.o_proj.weight @ torch.cat(heads_out)


@torch.no_grad()
def test_equation():
    torch.manual_seed(0)
    module, x = Lama(6, 3).double(), torch.randn(2, 5, 6).double()
    real = torch.tensor([[True] * 5, [False, True, True, False, True]])
    result = module(x, mask=real, need_weights=True)
    for row in range(2):
        torch.testing.assert_close(result.output[row], by_loops(module, x[row], real[row]))
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 3, 1).double())
    torch.testing.assert_close(module(x).output[0], result.output[0])


@torch.no_grad()
def test_no_weight_is_more_than_e_squared_times_another():
    module, x = Lama(6, 3).double(), 100 * torch.randn(2, 9, 6).double()
    weights = module(x, need_weights=True).weights
    assert (weights.amax(-1) / weights.amin(-1)).max() <= torch.e**2 + 1e-9


def test_scores_cost_two_vectors_per_head():
    module = Lama(32, 4)
    assert sum(p.numel() for n, p in module.named_parameters() if n != "o_proj.weight") == 2 * 32 * 4


def test_refuses_one_head_and_dense_masks():
    with pytest.raises(ValueError, match="at least 2"):
        Lama(6, 1)
    with pytest.raises(ValueError, match="dense"):
        Lama(6, 3)(torch.randn(2, 5, 6), mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
