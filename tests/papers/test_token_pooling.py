"""Token-aware average pooling against loops over cells, and the diversification loss against loops over rows."""

import pytest
import torch
import torch.nn.functional as F

from manyheads import create_attention
from manyheads.card import Pattern
from manyheads.registry import list_attentions, mechanism_class
from manyheads.testing.case import Case
from manyheads.training import TokenAwarePooling, attention_diversification


def build(scales=3, **config):
    torch.manual_seed(0)
    module = TokenAwarePooling(create_attention("softmax", 8, 2), scales=scales, **config).double().eval()
    with torch.no_grad():
        for parameter in module.predictor.parameters():
            parameter.normal_()
        module.predictor[1].running_mean.normal_()
        module.predictor[1].running_var.uniform_(0.5, 2)
    return module


def conv_by_loops(grid, weight):
    """grid: {(row, column): vector}; 3x3, zeros beyond."""
    found = {}
    for r, c in grid:
        total = torch.zeros(len(weight)).double()
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                if (r + dr, c + dc) in grid:
                    total = total + weight[:, :, dr + 1, dc + 1] @ grid[r + dr, c + dc]
        found[r, c] = total
    return found


def pooled_by_loops(module, grid):
    first, norm, second = module.predictor
    scores = conv_by_loops(grid, first.weight)
    spread = (norm.running_var + norm.eps).sqrt()
    scores = {p: (s - norm.running_mean) / spread * norm.weight + norm.bias for p, s in scores.items()}
    scores = conv_by_loops(scores, second.weight)
    found = {}
    for (r, c), score in scores.items():
        choice = (score / module.temperature).exp()
        choice = choice / choice.sum()
        found[r, c] = choice[0] * grid[r, c]
        for s in range(1, module.scales):
            near = [grid.get((r + s * i, c + s * j)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            found[r, c] = found[r, c] + choice[s] * sum(v for v in near if v is not None) / 9
    return found


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_pooling(padded):
    module, x = build(width=4, temperature=2.0), torch.randn(1, 12, 8).double()
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 9:] = not padded
    grid = {(i // 4, i % 4): x[0, i] if mask[0, i] else torch.zeros(8).double() for i in range(12)}
    found = pooled_by_loops(module, grid)
    pooled = torch.stack([found[i // 4, i % 4] for i in range(12)])[None]
    wanted = module.mechanism(pooled, mask=mask, need_weights=True)
    result = module(x, mask=mask, need_weights=True)
    torch.testing.assert_close(result.output, wanted.output)
    torch.testing.assert_close(result.weights, wanted.weights)


@torch.no_grad()
def test_one_scale_is_the_mechanism():
    module, x = build(scales=1), torch.randn(2, 9, 8).double()
    torch.testing.assert_close(module(x).output, module.mechanism(x).output)


@torch.no_grad()
def test_grids_go_in_as_grids():
    torch.manual_seed(0)
    module = TokenAwarePooling(create_attention("agent", 8, 2)).double().eval()
    x, mask = torch.randn(2, 3, 4, 8).double(), torch.rand(2, 3, 4) > 0.3
    pooled = module.pool(x.masked_fill(~mask[..., None], 0).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x, mask=mask).output, module.mechanism(pooled, mask=mask).output)


@torch.no_grad()
def test_the_norm_of_the_block_comes_after_pooling():
    module, x = build(norm=torch.nn.LayerNorm(8)), torch.randn(2, 9, 8).double()
    torch.nn.init.normal_(module.norm.weight)
    pooled = module.pool(x.unflatten(1, (3, 3)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x).output, module.mechanism(module.norm(pooled)).output)


def diversification_by_loops(weights, threshold, real):
    cosines = []
    for row in range(len(weights)):
        a, queries = weights[row].mean(0), [i for i in range(weights.shape[2]) if real[row][i]]
        mean, cut = sum(a[i] for i in queries) / len(queries), threshold / len(queries)
        mean = torch.tensor([float(v) if v > cut else 0.0 for v in mean]).double()
        for i in queries:
            kept = torch.tensor([float(v) if v > cut else 0.0 for v in a[i]]).double()
            cosines.append(F.cosine_similarity(mean, kept, dim=0))
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("threshold", [0.0, 0.8, 2.0])
def test_diversification(threshold):
    torch.manual_seed(0)
    weights = (2 * torch.randn(2, 3, 6, 6).double()).softmax(-1)
    full = [[True] * 6] * 2
    found = attention_diversification(weights, threshold=threshold)
    torch.testing.assert_close(found, diversification_by_loops(weights, threshold, full))
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    weights = weights.masked_fill(~real[:, None, None], 0)
    weights = weights / weights.sum(-1, keepdim=True)
    found = attention_diversification([weights, weights], threshold=threshold, queries=real)
    torch.testing.assert_close(found, diversification_by_loops(weights, threshold, real))


def test_diversification_of_equal_and_of_disjoint_rows():
    same = torch.zeros(1, 1, 4, 4)
    same[..., 2] = 1
    torch.testing.assert_close(attention_diversification(same), torch.tensor(1.0))
    torch.testing.assert_close(attention_diversification(torch.eye(4)[None, None], threshold=0.0), torch.tensor(0.5))
    assert attention_diversification(same, queries=torch.zeros(1, 4, dtype=torch.bool)) == 0


def test_the_loss_comes_with_training_and_reaches_the_predictor():
    module, x = build(threshold=0.5).train(), torch.randn(2, 9, 8).double()
    result = module(x)
    assert result.weights is None
    result.losses["attention_diversification"].backward()
    assert module.predictor[0].weight.grad.abs().max() > 0
    assert not module.eval()(x).losses


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        TokenAwarePooling(create_attention("softmax", 8, 2, causal=True))
    with pytest.raises(ValueError, match="width"):
        build()(torch.randn(1, 10, 8).double())
    with pytest.raises(ValueError, match="softmax: mask has dtype"):
        build()(torch.randn(1, 9, 8).double(), mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="no weights given"):
        attention_diversification([])


READS_ONE = (Pattern.NONCAUSAL_SELF, Pattern.GRID, Pattern.POOL)


@pytest.mark.parametrize("name", [n for n in list_attentions() if mechanism_class(n).card.patterns & set(READS_ONE)])
def test_every_mechanism_of_the_registry_that_reads_one_sequence(name):
    cls = mechanism_class(name)
    for pattern in set(READS_ONE) & cls.card.patterns:
        case = Case(cls, pattern)
        for nothing in (False, True):
            module, x = TokenAwarePooling(case.build(), threshold=1.0).double().train(), case.x(9).requires_grad_()
            mask = torch.full(x.shape[:-1], not nothing)
            try:
                result = module(x, mask=mask)
            except ValueError as error:
                assert "no weights to diversify" in str(error)  # noqa: PT017
                module.threshold = None
                result = module(x, mask=mask)
            (result.output.sum() + sum(result.losses.values())).backward()
            assert bool(result.output.isfinite().all())
            assert all(bool(loss.isfinite()) for loss in result.losses.values())
            assert bool(x.grad.isfinite().all())
