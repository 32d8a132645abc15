"""Dynamic mask attention (arXiv:2508.02124) against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.dma import DMA


def build(**config: int) -> DMA:
    module = DMA(16, 4, **config).double()
    torch.nn.init.normal_(module.amount)
    return module


def loops(module: DMA, x: Tensor) -> Tensor:
    d, shared, rows = module.head_dim, module.heads // module.kv_heads, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    flat = x @ module.v_proj.weight.T
    for i in range(len(x)):
        mixed = []
        for h in range(module.heads):
            g = h // shared
            delta = [
                float(module.amount[g]) * math.log1p(math.exp(float(module.delta_proj.weight[g] @ flat[j])))
                for j in range(i + 1)
            ]
            best = sorted(range(i + 1), key=lambda j, s=delta: -s[j])[: module.window]  # type: ignore[misc]
            scores = [math.exp(float(q[h][i] @ k[g][j]) / math.sqrt(d) + delta[j]) for j in best]
            mixed.append(sum(s * v[g][j] for s, j in zip(scores, best, strict=True)) / sum(scores))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize(("window", "kv_heads", "n"), [(1, 4, 9), (5, 2, 70), (9, 1, 140), (30, 4, 17)])
def test_equals_loops(window: int, kv_heads: int, n: int) -> None:
    module = build(window=window, kv_heads=kv_heads)
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_at_first_it_is_a_sliding_window() -> None:
    weights = DMA(16, 4, window=3)(torch.randn(1, 10, 16), need_weights=True).weights
    assert weights is not None
    lag = torch.arange(10)[:, None] - torch.arange(10)
    assert torch.equal(weights[0, 0] > 0, (lag >= 0) & (lag < 3))


def test_a_wide_window_at_first_is_plain_attention() -> None:
    module, plain = DMA(16, 4, window=80, rotary={}).double(), Softmax(16, 4, causal=True, rotary={}).double()
    own = module.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_the_state_holds_the_window_whatever_the_length() -> None:
    module = build(window=5, kv_heads=2)
    x, state = torch.randn(1, 90, 16, dtype=torch.float64), None
    with torch.no_grad():
        state = module.init_state(1)
        module(x, state=state)
        flat = module.v_proj(x)
        delta = module.amount * torch.nn.functional.softplus(module.delta_proj(flat))
    assert torch.equal(state.fixed["places"][0], delta[0].topk(5, dim=0).indices.sort(0).values.T)


@pytest.mark.parametrize(("config", "word"), [({"window": 0}, "must be positive"), ({"kv_heads": 3}, "multiple")])
def test_refuses(config: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        DMA(16, 4, **config)
