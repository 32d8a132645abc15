"""Soft and hard visual attention (arXiv:1502.03044) against loops."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional import additive
from manyheads.mechanisms.scoring import visual
from manyheads.mechanisms.scoring.visual import Baseline, HardVisual, SoftVisual


def probabilities(module: SoftVisual | HardVisual, x: Tensor, a: Tensor, temperature: float = 1.0) -> Tensor:
    """[h, n, m] for one row."""
    score = module.gaze.score
    heads, d = score.direction.shape
    found = torch.zeros(heads, len(x), len(a), dtype=x.dtype)
    for i in range(len(x)):
        for h in range(heads):
            part, terms = slice(h * d, (h + 1) * d), []
            for j in range(len(a)):
                hidden = score.place_proj.weight[part] @ a[j] + score.query_proj.weight[part] @ x[i]
                hidden = hidden + score.query_proj.bias[part]
                pairs = zip(score.direction[h].tolist(), hidden.tolist(), strict=True)
                terms.append(math.exp(temperature * sum(u * math.tanh(t) for u, t in pairs)))
            found[h, i] = torch.tensor([term / sum(terms) for term in terms])
    return found


def read(module: SoftVisual | HardVisual, x: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    d, rows = module.dim // module.heads, []
    for i in range(len(x)):
        mixed = [sum(weights[h, i, j] * a[j, h * d : (h + 1) * d] for j in range(len(a))) for h in range(module.heads)]
        gate = 1.0
        if module.gaze.selector is not None:
            logit = float(module.gaze.selector.weight[0] @ x[i] + module.gaze.selector.bias)
            gate = 1 / (1 + math.exp(-logit))
        rows.append(gate * torch.cat(mixed))
    return torch.stack(rows)


def inputs(n: int = 4, m: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(m)[None] < torch.tensor([[m], [m - 2]])
    return torch.randn(2, n, 12, dtype=torch.float64), torch.randn(2, m, 12, dtype=torch.float64), mask


@pytest.mark.parametrize(("heads", "selector"), [(1, True), (3, True), (3, False)])
@torch.no_grad()
def test_soft_equals_loops(heads: int, selector: bool) -> None:
    module, (x, a, mask) = SoftVisual(12, heads, selector=selector).double(), inputs()
    result = module(x, a.masked_fill(~mask[..., None], 1e3), mask=mask, need_weights=True)
    penalty = 0.0
    for row, real in enumerate((6, 4)):
        weights = probabilities(module, x[row], a[row, :real])
        torch.testing.assert_close(result.weights[row, :, :, :real], weights)
        torch.testing.assert_close(result.output[row], read(module, x[row], a[row, :real], weights))
        for h in range(heads):
            penalty += sum((1 - float(weights[h, :, j].sum())) ** 2 for j in range(real)) / heads / 2
    torch.testing.assert_close(result.losses["doubly-stochastic"].item(), penalty)


@torch.no_grad()
def test_a_balanced_gaze_costs_nothing() -> None:
    weights = torch.eye(5)[None, None]
    torch.testing.assert_close(visual.unbalance(weights, None), torch.tensor(0.0))
    torch.testing.assert_close(visual.unbalance(2 * weights, None), torch.tensor(5.0))


@torch.no_grad()
def test_slices_of_rows_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x, a, _) = SoftVisual(12, 3).double(), inputs()
    whole = module(x, a).output
    monkeypatch.setattr(additive, "HIDDEN", 1)
    torch.testing.assert_close(module(x, a).output, whole)


@torch.no_grad()
def test_hard_takes_the_likeliest_place_in_evaluation() -> None:
    module, (x, a, mask) = HardVisual(12, 3, temperature=1.5).double().eval(), inputs()
    result = module(x, a, mask=mask, need_weights=True)
    entropy = 0.0
    for row, real in enumerate((6, 4)):
        weights = probabilities(module, x[row], a[row, :real], 1.5)
        best = torch.zeros_like(weights)
        for h in range(3):
            for i in range(4):
                best[h, i, max(range(real), key=lambda j: float(weights[h, i, j]))] = 1.0
        torch.testing.assert_close(result.weights[row, :, :, :real], best)
        torch.testing.assert_close(result.output[row], read(module, x[row], a[row, :real], best))
        entropy += float((weights * weights.log()).sum()) / 24
    torch.testing.assert_close(result.losses["negative-entropy"].item(), entropy)


def test_hard_draws_places_by_their_probabilities() -> None:
    torch.manual_seed(0)
    module = HardVisual(12, 3, soft_share=0.0, temperature=3.0).double().train()
    x = torch.randn(1, 2, 12, dtype=torch.float64).expand(4000, -1, -1)
    a = torch.randn(1, 4, 12, dtype=torch.float64).expand(4000, -1, -1)
    with torch.no_grad():
        drawn = module(x, a, need_weights=True).weights
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    wanted = probabilities(module, x[0], a[0], 3.0)
    torch.testing.assert_close(drawn.mean(0), wanted, atol=0.04, rtol=0)
    module.soft_share = 1.0
    with torch.no_grad():
        torch.testing.assert_close(module(x[:1], a[:1], need_weights=True).weights[0], wanted)


def test_reinforce_learns_where_to_look() -> None:
    """A reward for looking at the place whose first feature is 1; nothing else tells the module to."""
    torch.manual_seed(0)
    module, baseline = HardVisual(8, 1, soft_share=0.0), Baseline()
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    target = torch.randint(5, (64,))
    a = 0.1 * torch.randn(64, 5, 8)
    a[torch.arange(64), target, 0] = 1.0
    x = torch.randn(64, 1, 8)
    rewards = torch.zeros(())
    for _ in range(150):
        chosen = module(x, a, need_weights=True).weights
        rewards = chosen[torch.arange(64), 0, 0, target]
        loss = -(baseline(rewards) * module.log_probability(x, a, chosen)[:, 0]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(rewards.mean()) > 0.8
    assert 0.3 < baseline.value < 1.0


def test_the_baseline_is_a_moving_average_of_what_came_before() -> None:
    baseline = Baseline()
    assert baseline(torch.tensor([2.0, 4.0])).tolist() == [2.0, 4.0]
    assert baseline.value == pytest.approx(0.3)
    torch.testing.assert_close(baseline(torch.tensor([1.0])), torch.tensor([0.7]))
    assert baseline.value == pytest.approx(0.9 * 0.3 + 0.1)


@torch.no_grad()
def test_log_probability_of_what_was_taken() -> None:
    module, (x, a, mask) = HardVisual(12, 3).double().eval(), inputs()
    chosen = module(x, a, mask=mask, need_weights=True).weights
    found = module.log_probability(x, a, chosen, mask=mask)
    for row, real in enumerate((6, 4)):
        best = probabilities(module, x[row], a[row, :real]).amax(-1).log().sum(0)
        torch.testing.assert_close(found[row], best)
    with pytest.raises(ValueError, match="soft_share"):
        HardVisual(12, 3, soft_share=2.0)
