"""Fast KVzip: its gate in loops, and the best of all layers and heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import held
from safetensors.torch import save_file
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.shrink import FastKVzip, release

SIZE, WIDTH, SINKS = 24, 4, 3


def gates(layers: int = 3, heads: int = 2, repeat: int = 2, dim: int = 32) -> list[dict[str, Tensor]]:
    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return [
        {
            "q_proj.weight": some(heads * repeat * WIDTH, dim),
            "q_proj.bias": some(heads * repeat * WIDTH),
            "k_proj.weight": some(heads * WIDTH, dim),
            "q_norm.weight": some(WIDTH),
            "k_norm.weight": some(WIDTH),
            "k_base": some(heads, 1, SINKS, WIDTH),
            "b": some(heads, 1, repeat),
        }
        for _ in range(layers)
    ]


def loops(gate: dict[str, Tensor], state: Tensor, head: int) -> float:
    def normed(row: Tensor, weight: Tensor) -> list[float]:
        size = math.sqrt(sum(float(x) ** 2 for x in row) / WIDTH + 1e-6)
        return [float(x) / size * float(w) for x, w in zip(row, weight, strict=True)]

    queries = (gate["q_proj.weight"] @ state + gate["q_proj.bias"]).view(2, 2, WIDTH)[head]
    key = normed((gate["k_proj.weight"] @ state).view(2, WIDTH)[head], gate["k_norm.weight"])
    total = 0.0
    for place, row in enumerate(queries):
        query = normed(row, gate["q_norm.weight"])
        logit = sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(WIDTH) + float(
            gate["b"][head, 0, place]
        )
        bases = [float(torch.tensor(query).double() @ own) / math.sqrt(WIDTH) for own in gate["k_base"][head, 0]]
        total += 1 / (1 + sum(math.exp(base - logit) for base in bases))
    return total / 2


def states(model: Any, tokens: Tensor) -> list[Tensor]:
    """What each layer's attention is given of one row, [n, e]."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("per_layer", [False, True])
def test_what_the_gates_say(per_layer: bool) -> None:
    """In each row of a padded batch what its own tokens are worth."""
    model, tokens, own = tiny("llama").double(), prompt(2, SIZE), gates()
    padding = torch.ones(2, SIZE, dtype=torch.long)
    padding[1, :6] = 0
    policy = FastKVzip(gates=own, compression_ratio=0.5, sink_size=2, window_ratio=0.15, per_layer=per_layer)
    cache = policy.make_cache(model)
    with torch.no_grad():
        positions = (padding.cumsum(1) - 1).clamp_min(0)
        model(tokens, attention_mask=padding, position_ids=positions, past_key_values=cache)
        release(model)
        for row, first in enumerate((0, 6)):
            n, score = SIZE - first, {}
            for layer, rows in enumerate(states(model, tokens[row : row + 1, first:])):
                for head in range(2):
                    for place in range(n):
                        safe = 3.0 if place < 2 else 2.0 if place >= n - int(n * 0.15) else 0.0
                        score[layer, head, place] = safe or loops(own[layer], rows[place], head)
            parts = [[at for at in score if at[0] == layer] for layer in range(3)] if per_layer else [list(score)]
            kept = [at for part in parts for at in sorted(part, key=lambda at: -score[at])[: len(part) // 2]]
            for layer, held_by in enumerate(cache.layers):
                for head in range(2):
                    wanted = sorted(at[2] for at in kept if at[:2] == (layer, head))
                    assert [s - first for s in held(held_by)[row, head] if s >= first] == wanted


def test_hooks_go_with_their_cache() -> None:
    model = tiny("llama")
    cache: Any = FastKVzip(gates=gates(), budget_tokens=8).make_cache(model)
    with torch.no_grad():
        model(prompt(1, SIZE), past_key_values=cache)
        model(prompt(1, 1), past_key_values=cache)
    assert sum(length for own in cache.lengths() for length in own) == 6 * (8 + 1)
    assert "gated" not in cache.shared
    assert model.model.layers[0].self_attn._forward_pre_hooks
    del cache
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert not model.base_model._forward_hooks


def test_gates_from_a_file(tmp_path: Path) -> None:
    own = gates()
    save_file({f"{i}.{name}": part for i, gate in enumerate(own) for name, part in gate.items()}, tmp_path / "g")
    torch.testing.assert_close(FastKVzip(gates=tmp_path / "g").pieces, own)
    (tmp_path / "text").write_text("no")
    save_file({"module": torch.ones(1)}, tmp_path / "other")
    for name, match in (
        ("text", r"no \.safetensors file"),
        ("other", "holds 'module'; want"),
        ("none", "is no file; save"),
    ):
        with pytest.raises(ValueError, match=match):
            FastKVzip(gates=str(tmp_path / name))


@pytest.mark.parametrize(("given", "match"), [
    ({"gates": [{}]}, r"layer 0's gate lacks q_proj.weight"),
    ({"gates": [], "window_ratio": 1.0}, "window_ratio is a share"),
    ({"gates": [], "when": "both"}, "when='both' is not possible"),
    ({"gates": [], "budget_tokens": 4}, "below the 5"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FastKVzip(**given)


def test_what_a_model_refuses() -> None:
    with pytest.raises(ValueError, match="sliding window"):
        FastKVzip(gates=gates(), budget_tokens=8).make_cache(tiny("mistral"))
    for wrong in (gates(layers=2), gates(dim=16), gates(heads=4, repeat=1), []):
        with pytest.raises(ValueError, match="take the gates that were trained for it"):
            FastKVzip(gates=wrong, budget_tokens=8).make_cache(tiny("llama"))


def test_a_context_in_chunks() -> None:
    """The gates read every chunk, and what is kept is what is kept of one pass."""
    model, tokens, own = tiny("llama").double(), prompt(2, SIZE), gates()
    policy = FastKVzip(gates=own, compression_ratio=0.5, sink_size=2, window_ratio=0.15)
    caches = []
    for ends in ([SIZE], [10, 17, SIZE]):
        cache, start = policy.make_cache(model), 0
        cache.expect(SIZE)
        for end in ends:
            with torch.no_grad():
                model(tokens[:, start:end], past_key_values=cache)
            start = end
        caches.append([held(layer) for layer in cache.layers])
    assert caches[0] == caches[1]
    assert sum(len(slots) for layer in caches[1] for slots in layer.values()) == 2 * 6 * SIZE // 2
    release(model)
