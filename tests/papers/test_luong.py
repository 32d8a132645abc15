"""Luong's attention: each score and each reach as loops, and what a window leaves out."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from manyheads.functional import additive
from manyheads.mechanisms.projection.luong import Luong

close = torch.testing.assert_close


def raw_score(module: Luong, h: int, query: Tensor, key: Tensor) -> float:
    if module.kind == "dot":
        return float(query @ key)
    if module.kind == "general":
        return float(query @ module.q_proj[h] @ key)
    return float(module.score_vector[h] @ (query @ module.q_proj[h] + key @ module.k_proj[h]).tanh())


def loops(module: Luong, x: Tensor, source: Tensor) -> Tensor:
    """One sequence; t counts from 0."""
    n, s, d, dim = len(x), len(source), module.dim // module.heads, module.dim
    mixed = torch.zeros(n, dim, dtype=x.dtype)
    for t, h in product(range(n), range(module.heads)):
        part, place = slice(h * d, (h + 1) * d), float(min(t, s - 1))
        if module.reach == "local-p":
            hidden = (module.place_proj.weight @ x[t]).tanh()[part]
            place = s / (1 + math.exp(-float(module.place_vector[h] @ hidden)))
        near = [j for j in range(s) if module.reach == "global" or abs(j - math.floor(place)) <= module.window]
        scores = [raw_score(module, h, x[t, part], source[j, part]) for j in near]
        total = sum(math.exp(score) for score in scores)
        for j, score in zip(near, scores, strict=True):
            weight = math.exp(score) / total
            if module.reach == "local-p":
                sigma = module.window / 2
                weight *= math.exp(-((j - place) ** 2) / (2 * sigma**2))
            mixed[t, part] += weight * source[j, part]
    return (torch.cat([mixed, x], 1) @ module.o_proj.weight.T).tanh()


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("reach", ["global", "local-m", "local-p"])
@pytest.mark.parametrize(("heads", "m"), [(1, 7), (2, 3)])
@torch.no_grad()
def test_equals_loops(score: str, reach: str, heads: int, m: int) -> None:
    torch.manual_seed(0)
    module = Luong(8, heads, score=score, reach=reach, window=2).double()
    x, source = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, m, 8, dtype=torch.float64)
    close(module(x, source).output[0], loops(module, x[0], source[0]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reach", ["global", "local-m", "local-p"])
@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_padding_is_not_part_of_the_source(reach: str, window: int) -> None:
    """On either side and in between: S and the places in it count real tokens only."""
    torch.manual_seed(0)
    module = Luong(8, 2, reach=reach, window=window).double()
    x, source = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.tensor([[False] * 3 + [True] * 4, [True, True, False, True, True, False, True]])
    result = module(x, source, mask=mask, need_weights=True)
    for row in range(2):
        alone = module(x[row : row + 1], source[row : row + 1, mask[row]], need_weights=True)
        close(result.output[row], alone.output[0], rtol=1e-12, atol=1e-12)
        close(result.weights[row][..., mask[row]], alone.weights[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_predicted_places_are_those_of_the_released_code() -> None:
    """The code's srcLens counts an end-of-sentence and its places count from 1: (srcLens - 1) sigmoid + 1."""
    torch.manual_seed(0)
    module = Luong(8, 1, reach="local-p", window=1).double()
    x, words = 3 * torch.randn(1, 40, 8, dtype=torch.float64), 6
    scale = (module.place_proj(x).tanh() @ module.place_vector[0]).sigmoid()[0]
    weights = module(x, torch.randn(1, words, 8, dtype=torch.float64), need_weights=True).weights[0, 0]
    mu = scale * ((words + 1) - 1) + 1
    for t in range(40):
        seen = [j for j in range(1, words + 1) if abs(j - math.floor(mu[t])) <= 1]
        assert weights[t].nonzero().flatten().tolist() == [j - 1 for j in seen]
    assert math.floor(mu.max()) == words  # the last word is somebody's centre


@pytest.mark.parametrize("m", [3, 9])
@torch.no_grad()
def test_a_place_rounded_past_the_end_is_that_of_the_last_word(m: int) -> None:
    torch.manual_seed(0)
    module = Luong(8, 1, reach="local-p", window=1)
    module.place_proj.weight.copy_(100 * torch.eye(8))
    module.place_vector.fill_(10.0)
    x, source = torch.ones(1, 1, 8), torch.randn(1, m, 8)
    weights = module(x, source, need_weights=True).weights[0, 0, 0]
    assert weights.nonzero().flatten().tolist() == [m - 2, m - 1]


@torch.no_grad()
def test_the_gaussian_is_not_renormalised() -> None:
    torch.manual_seed(0)
    module = Luong(8, 2, reach="local-p", window=3).double()
    x, source = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 9, 8, dtype=torch.float64)
    total = module(x, source, need_weights=True).weights.sum(-1)
    assert bool((total < 1).all())
    module.reach = "local-m"
    close(module(x, source, need_weights=True).weights.sum(-1), torch.ones_like(total))


@torch.no_grad()
def test_a_wide_window_around_the_query_is_global() -> None:
    torch.manual_seed(0)
    local, wide = (Luong(8, 2, reach=reach, window=20).double() for reach in ("local-m", "global"))
    local.load_state_dict(wide.state_dict())
    x, source = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 9, 8, dtype=torch.float64)
    close(local(x, source).output, wide(x, source).output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reach", ["local-m", "local-p"])
@torch.no_grad()
def test_a_dense_mask_forbids_keys_in_and_out_of_the_window(reach: str) -> None:
    torch.manual_seed(0)
    x, source = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 7, 8, dtype=torch.float64)
    mask = torch.rand(1, 2, 5, 7) < 0.6
    for window in (2, 3, 9):
        module = Luong(8, 2, reach=reach, window=window).double()
        result = module(x, source, mask=mask, need_weights=True)
        assert bool((result.weights[~mask] == 0).all())
        assert bool((result.weights > 0).any())
        mixed = (result.weights @ source.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(-2)
        close(result.output, module.o_proj(torch.cat([mixed, x], -1)).tanh(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"reach": "global"}, {"reach": "local-m", "window": 1000}])
@torch.no_grad()
def test_hidden_values_of_pairs_are_not_held_all_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str | int]
) -> None:
    """One per feature, query and key in the concat score; nor are keys gathered again for every query."""
    monkeypatch.setattr(additive, "HIDDEN", 20000)
    module, x, source = Luong(32, 2, score="concat", **settings), torch.randn(1, 60, 32), torch.randn(1, 90, 32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        module(x, source)
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 60 * 90 * 32


@pytest.mark.parametrize("reach", ["global", "local-m"])
@torch.no_grad()
def test_the_concat_score_projects_its_context_once(reach: str) -> None:
    torch.manual_seed(0)
    module = Luong(8, 2, causal=True, score="concat", reach=reach, window=1).double()
    x, source = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    wanted, state = module(x, source).output, module.init_state(2)
    first = module(x[:, :2], source, state=state).output
    module.k_proj.fill_(torch.nan)
    close(torch.cat([first, module(x[:, 2:], source, state=state).output], 1), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="made for a context of 7 tokens, this one has 6"):
        module(x[:, :1], source[:, :6], state=state)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="score='location'"):
        Luong(8, 2, score="location")
    with pytest.raises(ValueError, match="reach='local'"):
        Luong(8, 2, reach="local")
    with pytest.raises(ValueError, match="window=0"):
        Luong(8, 2, window=0)
