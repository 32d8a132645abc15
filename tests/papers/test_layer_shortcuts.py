"""Layerwise attention shortcuts as loops over tokens and depths, and what each stream does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.recurrent.layer_shortcuts import LayerShortcuts


def built(layers: int = 3) -> LayerShortcuts:
    torch.manual_seed(0)
    return LayerShortcuts(6 * (layers + 1), 2, layers=layers).double()


def tokens(n: int, dim: int = 24) -> Tensor:
    return torch.randn(2, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def by_loops(module: LayerShortcuts, x: Tensor) -> tuple[Tensor, Tensor]:
    n, layers = x.shape[1], module.layers
    shares = torch.zeros(2, 2, n, n, layers, dtype=x.dtype)
    out = torch.zeros(2, n, 6, dtype=x.dtype)
    for b in range(2):
        for i in range(n):
            query = module.q_proj.weight @ x[b, i, :6]
            for h in range(2):
                part, found = slice(3 * h, 3 * h + 3), []
                for j in range(i + 1):
                    for layer in range(layers):
                        first, _, second = module.features[layer]
                        inner = first.weight @ x[b, j, 6 * layer + 6 : 6 * layer + 12] + first.bias
                        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
                        feature = second.weight @ inner + second.bias
                        key, value = module.k_proj.weight @ feature, module.v_proj.weight @ feature
                        score = math.exp(float(query[part] @ key[part]) / math.sqrt(3))
                        found.append((j, layer, score, value[part]))
                total = sum(score for _, _, score, _ in found)
                for j, layer, score, value in found:
                    shares[b, h, i, j, layer] = score / total
                    out[b, i, part] += score / total * value
    out = out @ module.o_proj.weight.T
    return torch.cat([out, torch.zeros(2, n, 6 * layers, dtype=x.dtype)], -1), shares


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_equals_the_equation(layers: int) -> None:
    module, x = built(layers), tokens(5, 6 * (layers + 1))
    wanted, shares = by_loops(module, x)
    assert_close(module(x).output, wanted)
    result = module(x, need_weights=True)
    assert_close(result.output, wanted)
    assert_close(result.weights, shares.sum(-1))
    assert_close(module.depth_weights(x), shares)


@torch.no_grad()
def test_the_last_layer_asks_and_the_others_answer() -> None:
    module, x = built(), tokens(5)
    clean = module(x).output
    for stream in range(4):
        changed = x.clone()
        changed[:, 2, 6 * stream : 6 * stream + 6] += 1.0
        moved = (module(changed).output - clean).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == (
            [False, False, True, False, False] if stream == 0 else [False, False, True, True, True]
        )


@torch.no_grad()
def test_layers_are_told_apart_by_their_maps_alone() -> None:
    module, x = built(), tokens(5)
    swapped = x.clone()
    swapped[..., 6:12], swapped[..., 12:18] = x[..., 12:18], x[..., 6:12]
    assert (module(swapped).output - module(x).output).abs().max() > 1e-4
    module.features[1].load_state_dict(module.features[0].state_dict())
    assert_close(module(swapped).output, module(x).output)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for dim, layers in ((24, 0), (24, 4), (20, 1)):
        with pytest.raises(ValueError, match=f"layer-shortcuts: dim={dim}, layers={layers}"):
            LayerShortcuts(dim, 8, layers=layers)
