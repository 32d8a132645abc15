"""Monotonic attention (arXiv:1704.00784, arXiv:1909.12406) against the recurrence and against walking heads."""

import math
import random

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from manyheads.mechanisms.scoring.monotonic import Monotonic, expected_alignment, stop_logits


def chances(module: Monotonic, x: Tensor, context: Tensor) -> list[list[list[float]]]:
    """p[h][i][j]."""
    found = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        q, k = x @ module.q_proj.weight[own].T, context @ module.k_proj.weight[own].T
        logits = [[float(a @ b) / 2 + float(module.offset) for b in k] for a in q]
        found.append([[1 / (1 + math.exp(-logit)) for logit in row] for row in logits])
    return found


def recurrence(p: list[list[float]]) -> list[list[float]]:
    """Raffel et al., eq. 9-11: q_ij = (1 - p_i,j-1) q_i,j-1 + a_i-1,j;  a_ij = p_ij q_ij."""
    before, rows = [1.0] + [0.0] * (len(p[0]) - 1), []
    for row in p:
        passing, own = 0.0, []
        for j, chance in enumerate(row):
            passing = (1 - row[j - 1]) * passing + before[j] if j else before[0]
            own.append(chance * passing)
        rows.append(own)
        before = own
    return rows


@torch.no_grad()
def test_equals_the_recurrence() -> None:
    module = Monotonic(12, 3, offset=-0.5).double().eval()
    x, context = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    result = module(x, context.masked_fill(~mask[..., None], 1e3), mask=mask, need_weights=True)
    for row, real in enumerate((7, 4)):
        p = chances(module, x[row], context[row, :real])
        weights = torch.tensor([recurrence(head) for head in p], dtype=torch.float64)
        torch.testing.assert_close(result.weights[row, :, :, :real], weights)
        v = (context[row, :real] @ module.v_proj.weight.T).split(4, 1)
        mixed = torch.cat([weights[h] @ v[h] for h in range(3)], 1)
        torch.testing.assert_close(result.output[row], mixed @ module.o_proj.weight.T)


def test_expectation_is_what_random_walkers_do() -> None:
    walker = random.Random(0)
    p = [[0.2, 0.5, 0.1, 0.7], [0.6, 0.3, 0.4, 0.2], [0.1, 0.9, 0.5, 0.5]]
    seen = torch.zeros(3, 4)
    for _ in range(20000):
        place = 0
        for i in range(3):
            while place < 4 and walker.random() >= p[i][place]:
                place += 1
            if place == 4:
                break
            seen[i, place] += 1 / 20000
    logits = torch.tensor(p).logit()[None, None]
    torch.testing.assert_close(expected_alignment(logits)[0, 0], seen, atol=0.015, rtol=0)


@torch.no_grad()
def test_hard_heads_stop_at_the_first_likely_place_and_never_turn_back() -> None:
    torch.manual_seed(0)
    module = Monotonic(12, 3, offset=0.0, hard=True).double().eval()
    x, context = torch.randn(1, 6, 12, dtype=torch.float64), torch.randn(1, 20, 12, dtype=torch.float64)
    weights = module(x, context, need_weights=True).weights[0]
    p, walked = chances(module, x[0], context[0]), 0
    for h in range(3):
        place = 0
        for i in range(6):
            while place < 20 and p[h][i][place] <= 0.5:
                place += 1
            wanted = torch.zeros(20, dtype=torch.float64)
            if place < 20:
                wanted[place] = 1.0
                walked = max(walked, place)
            torch.testing.assert_close(weights[h, i], wanted)
    assert walked > 1


@pytest.mark.parametrize("m", [1, 2, 3, 16, 17])
@torch.no_grad()
def test_alignment_of_any_context_equals_the_recurrence(m: int) -> None:
    p = torch.rand(1, 2, 4, m, dtype=torch.float64)
    wanted = torch.tensor([recurrence(head) for head in p[0].tolist()], dtype=torch.float64)
    torch.testing.assert_close(expected_alignment(p.logit())[0], wanted)


def test_long_walks_neither_vanish_nor_blow_up() -> None:
    """Stops of one in a thousand over 4096 places, then sure ones: division by cumulative products gives NaN."""
    logits = torch.full((1, 1, 3, 4096), -7.0)
    logits[..., 1, ::2] = 200.0
    logits.requires_grad_()
    alignment = expected_alignment(logits)
    alignment[..., -1, :].square().sum().backward()
    assert bool(logits.grad.isfinite().all())
    stops = torch.tensor(-7.0).sigmoid().double()
    wanted = stops * (1 - stops) ** torch.arange(4096)
    torch.testing.assert_close(alignment[0, 0, 0].double(), wanted, rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(alignment[0, 0, 1].sum().double(), wanted.sum(), rtol=1e-3, atol=0)


@torch.no_grad()
def test_no_pairs_of_places_are_held() -> None:
    logits = torch.randn(1, 2, 2, 500)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        expected_alignment(logits)
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 500 * 500


def test_sure_and_impossible_stops() -> None:
    logits = stop_logits(torch.tensor([[[[-800.0, 800.0, 5.0], [800.0, -3.0, 2.0]]]]), None, hard=False)
    wanted = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0474, 0.9526 * 0.8808]]]])
    torch.testing.assert_close(expected_alignment(logits), wanted, atol=1e-3, rtol=0)


def test_dropped_heads_are_made_up_for() -> None:
    torch.manual_seed(0)
    module = Monotonic(12, 3, noise=0.0, head_drop=0.5).train()
    x, context = torch.randn(1, 2, 12), torch.randn(1, 4, 12)
    with torch.no_grad():
        full = module.eval()(x, context, need_weights=True).weights
        seen = set()
        for _ in range(40):
            ratio = module.train()(x, context, need_weights=True).weights / full
            per_head = ratio.flatten(2).mean(-1)[0]
            kept = int((per_head > 0).sum())
            seen.add(kept)
            wanted = torch.where(per_head > 0, 3 / max(kept, 1), 0.0)
            torch.testing.assert_close(per_head, wanted)
    assert seen == {0, 1, 2, 3}


def test_refuses() -> None:
    with pytest.raises(ValueError, match="head_drop=1"):
        Monotonic(12, 3, head_drop=1.0)
