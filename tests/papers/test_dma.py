"""Dynamic mask attention (arXiv:2508.02124) against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.doge.configuration_doge import DogeConfig
from transformers.models.doge.modeling_doge import DogeAttention

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.dma import DMA


def build(**config: object) -> DMA:
    module = DMA(16, 4, **config).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(module.amount)
    return module


def loops(module: DMA, x: Tensor) -> Tensor:
    d, shared, rows = module.head_dim, module.heads // module.kv_heads, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    flat = x @ module.v_proj.weight.T
    # Of a key and a head alone, whoever asks.
    deltas = [
        [float(module.amount[g]) * math.log1p(math.exp(float(module.delta_proj.weight[g] @ row))) for row in flat]
        for g in range(module.kv_heads)
    ]
    for i in range(len(x)):
        mixed = []
        for h in range(module.heads):
            g = h // shared
            delta = deltas[g]
            best = sorted(range(i + 1), key=lambda j, s=delta: -s[j])[: module.window]  # type: ignore[misc]
            bias = {j: math.exp(delta[j]) if module.exponential else delta[j] for j in best}
            scores = [math.exp(float(q[h][i] @ k[g][j]) / math.sqrt(d) + bias[j]) for j in best]
            mixed.append(sum(s * v[g][j] for s, j in zip(scores, best, strict=True)) / sum(scores))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize(("window", "kv_heads", "n"), [(1, 4, 9), (5, 2, 70), (9, 1, 140), (30, 4, 17)])
def test_equals_loops(window: int, kv_heads: int, n: int, exponential: bool) -> None:
    module = build(window=window, kv_heads=kv_heads, exponential=exponential)
    x = torch.randn(2, n, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_the_exponential_form_is_that_of_doge_in_transformers() -> None:
    module = build(window=6, kv_heads=2, exponential=True)
    size = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "keep_window_size": 6}
    theirs = DogeAttention(DogeConfig(**size, attn_implementation="eager"), 0).double()
    theirs.q_norm = theirs.k_norm = torch.nn.Identity()
    names = {"delta_proj.weight": "dt_proj.weight", "amount": "A"}
    theirs.load_state_dict({names.get(name, name): value for name, value in module.state_dict().items()})
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    turn = torch.ones(2, 19, 4, dtype=x.dtype), torch.zeros(2, 19, 4, dtype=x.dtype)
    past = torch.full((19, 19), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
    torch.testing.assert_close(module(x).output, theirs(x, turn, past)[0])


def test_a_huge_exponential_stays_finite() -> None:
    module = build(window=3, exponential=True).float()
    assert module(1e4 * torch.randn(2, 9, 16)).output.isfinite().all()


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
