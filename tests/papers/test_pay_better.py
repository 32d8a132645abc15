"""Optimised, efficient and super attention: their equations as loops, and the projections that they do without."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.projection.efficient_slices import EfficientSlices
from manyheads.mechanisms.projection.optimised import Optimised
from manyheads.mechanisms.projection.super import Super

close = torch.testing.assert_close


def loops(module: Any, x: Tensor, causal: bool) -> Tensor:
    b, n, dim = x.shape
    d = dim // module.heads
    q = x @ module.q_proj.weight.T
    k = x @ module.k_proj.weight.T if hasattr(module, "k_proj") else x
    v = x
    if hasattr(module, "mixing"):
        v = torch.zeros_like(x)
        for i in range(n):
            for j in range(i + 1 if causal else n):
                v[:, i] += module.mixing[i, j] * x[:, j]
    mixed = torch.zeros_like(x)
    for row in range(b):
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(n):
                seen = range(i + 1 if causal else n)
                powers = [math.exp(float(q[row, i, part] @ k[row, j, part]) / math.sqrt(d)) for j in seen]
                for j, power in zip(seen, powers, strict=True):
                    mixed[row, i, part] += power / sum(powers) * v[row, j, part]
    return mixed @ module.o_proj.weight.T


def _module(kind: Any, causal: bool, heads: int = 3) -> Any:
    torch.manual_seed(0)
    settings = {"max_length": 9} if kind is Super else {}
    module = kind(12, heads, causal=causal, **settings).double()
    if kind is Super:
        with torch.no_grad():
            module.mixing.copy_(torch.randn(9, 9))
    return module


@pytest.mark.parametrize("kind", [Optimised, EfficientSlices, Super])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_equals_loops(kind: Any, causal: bool, heads: int) -> None:
    module, x = _module(kind, causal, heads), torch.randn(2, 6, 12, dtype=torch.float64)
    close(module(x).output, loops(module, x, causal), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [Optimised, EfficientSlices])
@torch.no_grad()
def test_is_softmax_with_identities_for_projections(kind: Any) -> None:
    module, plain = _module(kind, True), Softmax(12, 3, causal=True).double()
    for weight in (plain.k_proj.weight, plain.v_proj.weight):
        weight.copy_(torch.eye(12))
    plain.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    close(module(x).output, plain(x).output, rtol=1e-12, atol=1e-12)


def test_parameters() -> None:
    """3/4 and 1/2 of multi-head attention's."""
    whole = sum(p.numel() for p in Softmax(12, 3).parameters())
    assert sum(p.numel() for p in Optimised(12, 3).parameters()) * 4 == whole * 3
    assert sum(p.numel() for p in EfficientSlices(12, 3).parameters()) * 2 == whole


@torch.no_grad()
def test_efficient_holds_each_token_once() -> None:
    module, x = _module(EfficientSlices, True), torch.randn(1, 5, 12, dtype=torch.float64)
    state = module.init_state(1)
    module(x, state=state)
    assert sum(buffer.view().numel() for buffer in state.grown.values()) == 5 * 12


@torch.no_grad()
def test_super_starts_as_efficient() -> None:
    """W_A is the identity at first."""
    torch.manual_seed(0)
    one, other = Super(12, 3, max_length=8).double(), EfficientSlices(12, 3).double()
    other.load_state_dict({n: w for n, w in one.state_dict().items() if n != "mixing"})
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    close(one(x).output, other(x).output, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_super_weights_are_over_tokens() -> None:
    module, x = _module(Super, True), torch.randn(2, 6, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    mixed = result.weights @ x.unflatten(-1, (3, 4)).transpose(1, 2)
    close(result.output, module.o_proj(mixed.transpose(1, 2).flatten(-2)), rtol=1e-12, atol=1e-12)


def test_super_refusals() -> None:
    module = Super(12, 3, max_length=4)
    with pytest.raises(ValueError, match=r"5 tokens .* max_length=4"):
        module(torch.randn(1, 5, 12))
    for low, high in ((0, 9), (-1, 2)):
        with pytest.raises(ValueError, match=f"positions from {low} to {high}"):
            module(torch.randn(1, 2, 12), positions=torch.tensor([low, high]))
