"""Core context aware attention (arXiv:2412.12465) against loops, and as plain attention at its limits."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.rotary import rotate
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.tokens.cca import CoreContextAware
from manyheads.testing import LargestTensor

D = 4


def by_loops(module: CoreContextAware, x: Tensor) -> tuple[Tensor, Tensor]:
    n, g = len(x), module.group
    mixed, matrix = torch.zeros(n, 12, dtype=x.dtype), torch.zeros(3, n, n, dtype=x.dtype)
    for h in range(3):
        own = slice(D * h, D * h + D)
        shared = slice(D * (h * module.kv_heads // 3), D * (h * module.kv_heads // 3) + D)
        q, k = x @ module.q_proj.weight[own].T, x @ module.k_proj.weight[shared].T
        v = x @ module.v_proj.weight[shared].T
        if module.rotary is not None:
            q, k = (rotate(t[None, None], torch.arange(n)[None], module.rotary)[0, 0] for t in (q, k))
        for i in range(n):
            first = max(i - module.window + 1, 0) // g * g
            seen = []  # (score, which tokens with which share)
            for start in range(0, first, g):
                tokens = range(start, start + g)
                terms = [math.exp(float(q[start + g - 1] @ k[j]) / math.sqrt(D)) for j in tokens]
                shares = {j: term / sum(terms) for j, term in zip(tokens, terms, strict=True)}
                key = sum(share * k[j] for j, share in shares.items())
                seen.append((math.exp(float(q[i] @ key) / math.sqrt(D)), shares))
            seen += [(math.exp(float(q[i] @ k[j]) / math.sqrt(D)), {j: 1.0}) for j in range(first, i + 1)]
            total = sum(score for score, _ in seen)
            for score, shares in seen:
                for j, share in shares.items():
                    matrix[h, i, j] += score / total * share
        mixed[:, own] = matrix[h] @ v
    return mixed @ module.o_proj.weight.T, matrix


@pytest.mark.parametrize(("n", "group", "window"), [(11, 3, 4), (12, 4, 1), (9, 5, 2), (7, 2, 3), (1, 3, 4)])
@torch.no_grad()
def test_equals_loops(n: int, group: int, window: int) -> None:
    module = CoreContextAware(12, 3, group=group, window=window).double()
    x = torch.randn(2, n, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    for row in range(2):
        output, matrix = by_loops(module, x[row])
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row], matrix)


@pytest.mark.parametrize("kv_heads", [1, 3])
@torch.no_grad()
def test_with_rotary_positions_a_core_is_a_mean_of_turned_keys(kv_heads: int) -> None:
    module = CoreContextAware(12, 3, group=3, window=4, rotary={"base": 50.0}, kv_heads=kv_heads).double()
    x, state = torch.randn(2, 14, 12, dtype=torch.float64), module.init_state(2)
    found = module(x, need_weights=True)
    parts = torch.cat([module(part, state=state).output for part in x.split(3, 1)], 1)
    for row in range(2):
        output, matrix = by_loops(module, x[row])
        torch.testing.assert_close(found.output[row], output)
        torch.testing.assert_close(found.weights[row], matrix)
        torch.testing.assert_close(parts[row], output)


@pytest.mark.parametrize("more", [{}, {"rotary": {}, "kv_heads": 1}])
@pytest.mark.parametrize(("group", "window"), [(1, 1), (1, 3), (4, 11)])
@torch.no_grad()
def test_groups_of_one_or_a_wide_window_are_plain_attention(group: int, window: int, more: dict) -> None:
    module = CoreContextAware(12, 3, group=group, window=window, **more).double()
    plain = Softmax(12, 3, causal=True, **more).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


@torch.no_grad()
def test_padding_anywhere_is_as_if_it_were_not_there() -> None:
    module, x = CoreContextAware(12, 3, group=3, window=4).double(), torch.randn(2, 14, 12, dtype=torch.float64)
    mask = torch.tensor([[j not in (0, 1, 5, 9) for j in range(14)], [j % 3 != 1 for j in range(14)]])
    found, state = module(x, mask=mask).output, module.init_state(2)
    parts = [
        module(part, mask=real, state=state).output for part, real in zip(x.split(4, 1), mask.split(4, 1), strict=True)
    ]
    for row in range(2):
        wanted = by_loops(module, x[row, mask[row]])[0]
        torch.testing.assert_close(found[row, mask[row]], wanted)
        torch.testing.assert_close(torch.cat(parts, 1)[row, mask[row]], wanted)


@torch.no_grad()
def test_the_state_grows_by_a_core_per_group() -> None:
    module, state = CoreContextAware(12, 3, group=4, window=5).double(), None
    state = module.init_state(1)
    for _ in range(41):
        module(torch.randn(1, 1, 12, dtype=torch.float64), state=state)
    assert len(state.grown["core_keys"]) == 10
    assert state.fixed["keys"].shape[2] == 7


@pytest.mark.parametrize("before", [40, 300])  # less than a window, and more
def test_a_decoded_token_is_the_only_one_that_asks(before: int) -> None:
    module = CoreContextAware(12, 3, group=8, window=256)
    state = module.init_state(2)
    with torch.no_grad():
        module(torch.randn(2, before, 12), state=state)
        with LargestTensor() as largest:
            module(torch.randn(2, 1, 12), state=state)
    assert largest.size <= 2 * 3 * 300 * 8  # a group of queries, and the keys themselves; not window x window


def test_refuses() -> None:
    with pytest.raises(ValueError, match="group=0"):
        CoreContextAware(12, 3, group=0)
    with pytest.raises(ValueError, match="dense mask"):
        CoreContextAware(12, 3)(torch.randn(1, 3, 12), mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
