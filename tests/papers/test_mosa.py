"""MoSA (arXiv:2505.00315) against loops over heads and the tokens they choose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.mosa import MoSA
from manyheads.testing import check_mechanism


def loops(module: MoSA, x: Tensor) -> Tensor:
    n, d = len(x), module.head_dim
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    heads = []
    for h in range(module.heads):
        r = [float(module.router.weight[h] @ row) for row in x]
        rows = []
        for i in range(n):
            there = range(i + 1 if module.causal else n)
            best = sorted(there, key=lambda j, r=r: -r[j])[: module.top_k]  # type: ignore[misc]
            if module.include_first and 0 not in best:
                best = [0, *best[:-1]]
            if i not in best:
                rows.append(torch.zeros(d, dtype=x.dtype))
                continue
            scores = [math.exp(float(q[h][i] @ k[h][j]) / math.sqrt(d)) for j in best]
            mixed = sum(s * v[h][j] for s, j in zip(scores, best, strict=True)) / sum(scores)
            rows.append(mixed / (1 + math.exp(-r[i])))
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ module.o_proj.weight.T


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("top_k", "n"), [(1, 9), (5, 70), (12, 150), (40, 17)])
def test_equals_loops(top_k: int, n: int, first: bool, causal: bool) -> None:
    module = MoSA(16, 4, top_k=top_k, include_first=first, causal=causal).double()
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_all_tokens_chosen_and_open_gates_are_plain_attention(causal: bool) -> None:
    rotary = {"base": 100.0}
    module = MoSA(16, 4, top_k=30, causal=causal, rotary=rotary).double()
    plain = Softmax(16, 4, causal=causal, rotary=rotary).double()
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if "router" not in name})
    torch.nn.init.zeros_(module.router.weight)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(2 * module(x).output, plain(x).output)


def test_the_noncausal_choice_has_exactly_k_tokens_per_head() -> None:
    weights = MoSA(16, 4, top_k=3)(torch.randn(2, 15, 16), need_weights=True).weights
    assert weights is not None
    assert ((weights > 0).any(-1).sum(-1) == 3).all()
    assert ((weights > 0).any(-2).sum(-1) == 3).all()


def test_the_state_holds_k_tokens_whatever_the_length() -> None:
    module = MoSA(16, 4, top_k=3, causal=True)
    state, x = module.init_state(1), torch.randn(1, 130, 16)
    with torch.no_grad():
        module(x, state=state)
    assert state.fixed["keys"].shape == (1, 4, 3, 4)
    best = module.router(x)[0].topk(3, dim=0).indices.sort(0).values.T
    assert torch.equal(state.fixed["places"][0], best)


def test_equal_scores_keep_the_earlier_tokens() -> None:
    module = MoSA(16, 2, top_k=2, causal=True)
    torch.nn.init.zeros_(module.router.weight)
    weights = module(torch.randn(1, 6, 16), need_weights=True).weights
    assert weights is not None
    assert (weights[0, 0] > 0).nonzero().tolist() == [[0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("causal", [False, True])
def test_the_first_token_is_the_first_real_one(causal: bool) -> None:
    module = MoSA(16, 4, top_k=2, include_first=True, causal=causal).double()
    torch.nn.init.constant_(module.router.weight, 0.5)
    x = torch.randn(1, 9, 16, dtype=torch.float64).abs()
    x[:, 0] *= -1  # the worst of all, by far
    dirty = torch.cat([torch.full((1, 3, 16), 1e3, dtype=torch.float64), x], 1)
    mask = torch.arange(12)[None] >= 3
    result = module(dirty, mask=mask, need_weights=True)
    torch.testing.assert_close(result.output[:, 3:], module(x).output)
    assert (result.weights[0, :, 3, 3] > 0).all()
    assert (result.weights[0, :, 3:, 3] > 0).any(1).all()
    if causal:
        state = module.init_state(1)
        steps = [module(dirty[:, s], mask=mask[:, s], state=state).output for s in (slice(0, 2), slice(2, 8))]
        steps.append(module(dirty[:, 8:], state=state).output)
        torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], result.output[:, 3:])
        assert (state.fixed["places"][0, :, 0] == 3).all()


def test_conformance_with_the_first_token() -> None:
    check_mechanism(MoSA, config={"include_first": True}, largest=9)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="top_k=0"):
        MoSA(16, 4, top_k=0)
