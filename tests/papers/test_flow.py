"""Flow-Attention: both forms as loops over scalars, conservation, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.flow import FlowAttention

E = 1e-6


def built(**config: object) -> FlowAttention:
    torch.manual_seed(0)
    return FlowAttention(12, 3, **config).double()


def tokens(n: int, seed: int = 5) -> Tensor:
    return 2 * torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projected(module: FlowAttention, x: Tensor, source: Tensor, b: int, h: int) -> tuple[list[list[float]], ...]:
    part = slice(4 * h, 4 * h + 4)
    q, k, v = module.q_proj(x), module.k_proj(source), module.v_proj(source)
    return q[b, :, part].sigmoid().tolist(), k[b, :, part].sigmoid().tolist(), v[b, :, part].tolist()


def raised(one: list[float], two: list[float]) -> float:
    return sum((a + E) * (b + E) for a, b in zip(one, two, strict=True))


def total(rows: list[list[float]], factors: list[float]) -> list[float]:
    return [sum(f * row[e] for f, row in zip(factors, rows, strict=True)) for e in range(len(rows[0]))]


def normal_form(q: list[list[float]], k: list[list[float]], v: list[list[float]]) -> list[list[float]]:
    n, m = len(q), len(k)
    incoming = [1 / raised(row, total(k, [1.0] * m)) for row in q]
    outgoing = [1 / raised(row, total(q, [1.0] * n)) for row in k]
    sink = [1 / (1 + math.exp(-raised(row, total(k, outgoing)) * n / m)) for row in q]
    source = [math.exp(max(-1.0, min(1.0, raised(row, total(q, incoming))))) for row in k]
    competed = [m * s / sum(source) for s in source]
    out = []
    for i in range(n):
        flows = [incoming[i] * sum(a * b for a, b in zip(q[i], k[j], strict=True)) * competed[j] for j in range(m)]
        out.append([sink[i] * value for value in total(v, flows)])
    return out


def causal_form(q: list[list[float]], k: list[list[float]], v: list[list[float]]) -> list[list[float]]:
    incoming, outgoing, source, competed, out = [], [], [], [], []
    for i in range(len(q)):
        t = i + 1
        ones = [1.0] * t
        incoming.append(t / raised(q[i], total(k[:t], ones)))
        outgoing.append(t / raised(k[i], total(q[:t], ones)))
        sink = 1 / (1 + math.exp(-raised(q[i], total(k[:t], outgoing)) / t))
        source.append(math.exp(max(-1.0, min(1.0, raised(k[i], total(q[:t], incoming)) / t))))
        competed.append(t * source[i] / sum(source))
        flows = [incoming[i] / t * sum(a * b for a, b in zip(q[i], k[j], strict=True)) * competed[j] for j in range(t)]
        out.append([sink * value for value in total(v[:t], flows)])
    return out


@torch.no_grad()
def test_the_normal_form_equals_the_equation() -> None:
    module, x = built(chunk=3), tokens(7)
    for source in (x, tokens(4, 9)):
        wanted = torch.empty(2, 3, 7, 4, dtype=torch.float64)
        for b in range(2):
            for h in range(3):
                wanted[b, h] = torch.tensor(normal_form(*projected(module, x, source, b, h)), dtype=torch.float64)
        found = module(x, None if source is x else source).output
        assert_close(found, module.o_proj(wanted.transpose(1, 2).flatten(-2)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_causal_form_equals_the_equation() -> None:
    module, x = built(chunk=3, causal=True), tokens(8)
    wanted = torch.empty(2, 3, 8, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            wanted[b, h] = torch.tensor(causal_form(*projected(module, x, x, b, h)), dtype=torch.float64)
    assert_close(module(x).output, module.o_proj(wanted.transpose(1, 2).flatten(-2)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_flow_is_conserved() -> None:
    """Before competition each sink takes one in all; the competition hands out as much as there are sources."""
    module, x = built(), tokens(9)
    q, k = (p(x).unflatten(-1, (3, 4)).transpose(1, 2).sigmoid() for p in (module.q_proj, module.k_proj))
    real = torch.ones(2, 9, dtype=torch.bool)
    flow = module._whole(q, k, torch.ones_like(k), real, real)
    assert_close((flow.asking @ k.mT).sum(-1), torch.ones(2, 3, 9, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert_close(flow.given.sum(2), torch.full((2, 3, 1), 9.0, dtype=torch.float64))
    assert flow.given.std() > 1e-3


@torch.no_grad()
def test_tokens_that_are_not_there_carry_no_flow() -> None:
    x = tokens(8)
    mask = torch.tensor([True, False, True, True, False, False, True, True]).expand(2, -1)
    garbage = torch.where(mask[..., None], x, 1e3)
    for causal in (False, True):
        module = built(causal=causal, chunk=3)
        for need_weights in (False, True):
            found = module(garbage, mask=mask, need_weights=need_weights)
            assert_close(found.output[:, mask[0]], module(x[:, mask[0]]).output)
        assert (found.weights[..., ~mask[0]] == 0).all()


@torch.no_grad()
def test_weights_are_what_is_mixed() -> None:
    x = tokens(6)
    for causal in (False, True):
        module = built(causal=causal)
        result = module(x, need_weights=True)
        v = module.v_proj(x).unflatten(-1, (3, 4)).transpose(1, 2)
        assert_close(module.o_proj((result.weights @ v).transpose(1, 2).flatten(-2)), result.output)


def test_a_dense_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="flow: a dense mask"):
        built()(tokens(3), mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))


@torch.no_grad()
def test_a_grid_is_a_sequence_of_its_cells():
    torch.manual_seed(0)
    module, x = FlowAttention(8, 2).double().eval(), torch.randn(2, 3, 4, 8).double()
    mask = torch.rand(2, 3, 4) < 0.7
    wanted = module(x.flatten(1, 2), mask=mask.flatten(1), need_weights=True)
    found = module(x, mask=mask, need_weights=True)
    torch.testing.assert_close(found.output.flatten(1, 2), wanted.output)
    torch.testing.assert_close(found.weights, wanted.weights)
