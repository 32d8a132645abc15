"""Collinear constrained attention: a key per pair of tokens, turned as such; and what separates paper and code."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.rotary import Rotary, rotate
from manyheads.mechanisms.position.coca import CoCA

close = torch.testing.assert_close


def turned(pair: tuple[float, float], angle: float) -> tuple[float, float]:
    a, b = pair
    return a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)


def loops(module: CoCA, x: Tensor, positions: list[int]) -> Tensor:
    """One sequence, causal. For each pair of tokens its own key q * t, before anything is turned."""
    n, d, heads = len(x), module.head_dim, module.heads
    q, t, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    half, shared = d // 2, heads // module.kv_heads
    mixed = torch.zeros(n, heads * d, dtype=x.dtype)
    for h in range(heads):
        own, group = h * d, h // shared * d
        for i in range(n):
            powers = []
            for j in range(i + 1):
                score = 0.0
                for p in range(half):
                    theta = module.rotary.base ** (-2 * p / d)
                    scale = max(0.0, float(t[j, group + p] + t[j, group + half + p]) / 2)
                    pair = (float(q[i, own + p]), float(q[i, own + half + p]))
                    query = turned(pair, positions[i] * theta)
                    if module.released:
                        key = turned((scale, scale), positions[j] * theta)
                        score += pair[0] * query[0] * key[0] + pair[1] * query[1] * key[1]
                    else:
                        key = turned((pair[0] * scale, pair[1] * scale), positions[j] * theta)
                        score += query[0] * key[0] + query[1] * key[1]
                powers.append(math.exp(score / math.sqrt(d)))
            for j, power in enumerate(powers):
                mixed[i, own : own + d] += power / sum(powers) * v[j, group : group + d]
    return mixed @ module.o_proj.weight.T


def _module(**settings: object) -> CoCA:
    torch.manual_seed(0)
    return CoCA(16, 4, base=100.0, **settings).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_equals_loops(released: bool, kv_heads: int) -> None:
    module, x = _module(released=released, kv_heads=kv_heads), 2 * torch.randn(1, 6, 16, dtype=torch.float64)
    positions = [0, 1, 2, 5, 6, 9]
    output = module(x, positions=torch.tensor(positions)).output[0]
    close(output, loops(module, x[0], positions), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_only_the_paper_form_is_invariant_to_a_shift() -> None:
    x, positions = 2 * torch.randn(2, 7, 16, dtype=torch.float64), torch.arange(7)
    paper, code = _module(), _module(released=True)
    close(paper(x, positions=positions + 31).output, paper(x).output, rtol=1e-9, atol=1e-9)
    gap = code(x, positions=positions + 31).output - code(x).output
    assert float(gap.abs().max()) > 1e-3


@torch.no_grad()
def test_the_initial_angle_is_zero() -> None:
    """Whatever the query, it scores highest where it stands, among keys of the same t: the paper's aim."""
    module, x = _module(causal=False), 3 * torch.randn(1, 1, 16, dtype=torch.float64)
    weights = module(x.expand(1, 9, 16), need_weights=True).weights[0]
    own = weights.diagonal(dim1=-2, dim2=-1)
    assert bool((own >= weights.amax(-1) - 1e-12).all())
    assert bool((own > 2 / 9).any())  # a head in which some t is not zero


@torch.no_grad()
def test_a_dot_product_stands_for_the_key_per_pair() -> None:
    """At the scale of tensors: R_i q_i . R_j (q_i * t_j)."""
    module, x = _module(), torch.randn(1, 5, 16, dtype=torch.float64)
    q, k, _ = module.project(x, x)
    t = k[..., :2].repeat(1, 1, 1, 2)
    pairs = (q[:, :, :, None] * t[:, :, None]).flatten(1, 2)
    place, rotary = torch.arange(5)[None], Rotary(base=100.0)
    keys = rotate(pairs, place, rotary).unflatten(1, (4, 5))
    wanted = (rotate(q, place, rotary)[:, :, :, None] * keys).sum(-1)
    own = module.position(q, k, place, place)
    close(own[0] @ own[1].transpose(-1, -2), wanted, rtol=1e-12, atol=1e-12)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 features per head"):
        CoCA(12, 4)
