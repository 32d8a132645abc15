"""SeqBoat (arXiv:2306.11197) against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.selection.seqboat import SeqBoat
from manyheads.testing import check_mechanism


def silu(row: Tensor) -> Tensor:
    return row * row.sigmoid()


def average(module: SeqBoat, x: Tensor, way: int) -> Tensor:
    step, drop = module.ema_alpha[way].sigmoid(), module.ema_delta[way].sigmoid()
    held, rows = torch.zeros_like(step), []
    for row in x if way == 0 else x.flip(0):
        held = step * module.ema_beta[way] * row[:, None] + (1 - step * drop) * held
        rows.append((held * module.ema_eta[way]).sum(-1) / math.sqrt(held.shape[1]))
    return torch.stack(rows if way == 0 else rows[::-1])


def turn(row: Tensor, place: int) -> Tensor:
    pairs = torch.view_as_complex(row.view(-1, 2).contiguous())
    angles = torch.tensor([place * 10000.0 ** (-2 * p / len(row)) for p in range(len(pairs))], dtype=row.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()


def loops(module: SeqBoat, x: Tensor) -> Tensor:
    n, heads = len(x), module.heads
    moved = sum(average(module, x, way) for way in range(len(module.ema_alpha)))
    moved = silu(moved + module.omega * x)
    both = moved @ module.y_proj.weight.T + module.y_proj.bias
    probs = (both[:, :2] / module.temperature.exp()).softmax(-1)
    active = [i for i in range(n) if probs[i, 1] > probs[i, 0]]
    rows = []
    z, r, v = silu(moved @ module.in_proj.weight.T + module.in_proj.bias).split(
        [module.z_dim, module.v_dim, module.v_dim], -1
    )
    q, k = (module.kappa[side] * z + module.mu[side] for side in range(2))
    q, k = ([[turn(part, i) for part in row.chunk(heads)] for i, row in enumerate(side)] for side in (q, k))  # type: ignore[assignment]
    parts = [row.chunk(heads) for row in v]
    for i in range(n):
        h = torch.zeros_like(x[i])
        if i in active:
            at, mixed = active.index(i), []
            last = at if module.causal else at + module.window
            seen = active[max(0, at - module.window) : last + 1]
            for part in range(heads):
                scores = [float(q[i][part] @ k[j][part]) for j in seen]
                if module.normaliser == "softmax":
                    raised = [math.exp(s / math.sqrt(module.z_dim // heads)) for s in scores]
                    shares = [s / sum(raised) for s in raised]
                else:
                    shares = [max(s / (module.window * (1 if module.causal else 2)), 0.0) ** 2 for s in scores]
                mixed.append(sum(s * parts[j][part] for s, j in zip(shares, seen, strict=True)))
            h = probs[i, 1] * (module.h_proj.weight @ (torch.cat(mixed) * r[i]) + module.h_proj.bias)
        rows.append(silu(both[i, 2:] + h + x[i]))
    return torch.stack(rows)


def build(causal: bool, **config: object) -> SeqBoat:
    torch.manual_seed(3)
    module = SeqBoat(16, 4, causal=causal, ema_dim=3, **config).double()  # type: ignore[arg-type]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("normaliser", ["relu2", "softmax"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "n"), [(1, 9), (4, 40), (60, 80)])
def test_equals_loops(window: int, n: int, causal: bool, normaliser: str) -> None:
    module = build(causal, window=window, normaliser=normaliser, z_dim=16)
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_inactive_tokens_have_no_row_and_no_column(causal: bool) -> None:
    module = build(causal, window=5, normaliser="softmax")
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    weights = module(x, need_weights=True).weights
    assert weights is not None
    rows, columns = (weights > 0).any(1).any(-1), (weights > 0).any(1).any(1)
    assert torch.equal(rows, columns)
    assert 0 < rows.sum() < 40
    torch.testing.assert_close(weights.sum(-1), rows[:, None].expand(-1, 4, -1).double())


def test_with_no_active_token_only_the_average_is_left() -> None:
    module = build(True)
    with torch.no_grad():
        module.y_proj.weight[:2] = 0
        module.y_proj.bias[:2] = torch.tensor([1.0, 0.0])
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    before = module(x).output
    torch.nn.init.normal_(module.h_proj.weight)
    torch.testing.assert_close(module(x).output, before)


def test_softmax_conformance() -> None:
    names = ["decode", "decode-padded", "decode-weights", "padding", "weights", "no-future", "state-bytes"]
    check_mechanism(SeqBoat, config={"normaliser": "softmax"}, properties=names)


@pytest.mark.parametrize(
    ("config", "word"),
    [({"normaliser": "max"}, "want one of"), ({"window": 0}, "positive"), ({"z_dim": 6}, "multiple")],
)
def test_refuses(config: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SeqBoat(16, 4, **config)  # type: ignore[arg-type]
