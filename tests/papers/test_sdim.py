"""SDIM (arXiv:2205.10249) against loops over signatures and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.selection.sdim import SDIM


def signature(module: SDIM, h: int, g: int, row: Tensor) -> tuple[bool, ...]:
    part = row[h * module.head_dim : (h + 1) * module.head_dim]
    return tuple(bool(part @ module.planes[h, :, g * module.bits + bit] > 0) for bit in range(module.bits))


def loops(module: SDIM, x: Tensor, context: Tensor) -> Tensor:
    values = (context @ module.v_proj.weight.T).split(module.head_dim, -1)
    signed = {
        (h, g): [signature(module, h, g, c) for c in context] for h in range(module.heads) for g in range(module.groups)
    }
    out = []
    for row in x:
        heads = []
        for h in range(module.heads):
            total = torch.zeros(module.head_dim, dtype=x.dtype)
            for g in range(module.groups):
                own = signature(module, h, g, row)
                met = [v for v, c in zip(values[h], signed[h, g], strict=True) if c == own]
                found = sum(met, torch.zeros_like(total))
                norm = math.sqrt(float(found @ found)) if module.normalise else 1.0
                total += found / norm if met else 0.0
            heads.append(total / module.groups)
        out.append(module.o_proj.weight @ torch.cat(heads))
    return torch.stack(out)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("groups", "bits", "m"), [(1, 1, 9), (5, 3, 20), (3, 2, 1)])
def test_equals_loops(groups: int, bits: int, m: int, normalise: bool) -> None:
    module = SDIM(16, 4, groups=groups, bits=bits, normalise=normalise).double()
    x, context = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, m, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, *pair) for pair in zip(x, context, strict=True)])
        torch.testing.assert_close(module(x, context).output, wanted)


@pytest.mark.parametrize("normalise", [True, False])
def test_weights_times_values_are_the_output(normalise: bool) -> None:
    module = SDIM(16, 4, groups=6, bits=2, normalise=normalise).double()
    x, context = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    result = module(x, context, need_weights=True)
    values = module.v_proj(context).unflatten(-1, (4, 4)).transpose(1, 2)
    torch.testing.assert_close(module.o_proj((result.weights @ values).transpose(1, 2).flatten(-2)), result.output)


def test_in_expectation_weights_fall_with_the_angle() -> None:
    """Chance of a collision: (1 - angle / pi)^bits, by arXiv:2205.10249 and Charikar (2002)."""
    torch.manual_seed(0)
    module = SDIM(2, 1, groups=20000, bits=2, normalise=False).double()
    angles = [0.1, 0.8, 1.5, 2.5]
    context = torch.tensor([[[math.cos(a), math.sin(a)] for a in angles]], dtype=torch.float64)
    weights = module(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64), context, need_weights=True).weights
    wanted = torch.tensor([(1 - a / math.pi) ** 2 for a in angles], dtype=torch.float64)
    torch.testing.assert_close(weights[0, 0, 0], wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize(("groups", "bits"), [(0, 2), (2, 0), (2, 17)])
def test_refuses(groups: int, bits: int) -> None:
    with pytest.raises(ValueError, match="want groups"):
        SDIM(16, 4, groups=groups, bits=bits)
