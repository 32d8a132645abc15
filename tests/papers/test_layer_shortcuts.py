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
    return LayerShortcuts(6, 2, layers=layers).double()


def tokens(n: int, layers: int = 3) -> tuple[Tensor, Tensor]:
    """The last layer's input, and the outputs of those below."""
    streams = torch.randn(2, n, layers + 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return streams[:, :, 0], streams[:, :, 1:]


def by_loops(module: LayerShortcuts, x: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    n, layers = x.shape[1], module.layers
    shares = torch.zeros(2, 2, n, n, layers, dtype=x.dtype)
    out = torch.zeros(2, n, 6, dtype=x.dtype)
    for b in range(2):
        for i in range(n):
            query = module.q_proj.weight @ x[b, i]
            for h in range(2):
                part, found = slice(3 * h, 3 * h + 3), []
                for j in range(i + 1):
                    for layer in range(layers):
                        first, _, second = module.features[layer]
                        inner = first.weight @ earlier[b, j, layer] + first.bias
                        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
                        feature = second.weight @ inner + second.bias
                        key, value = module.k_proj.weight @ feature, module.v_proj.weight @ feature
                        score = math.exp(float(query[part] @ key[part]) / math.sqrt(3))
                        found.append((j, layer, score, value[part]))
                total = sum(score for _, _, score, _ in found)
                for j, layer, score, value in found:
                    shares[b, h, i, j, layer] = score / total
                    out[b, i, part] += score / total * value
    return out @ module.o_proj.weight.T, shares


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_equals_the_equation(layers: int) -> None:
    module, (x, earlier) = built(layers), tokens(5, layers)
    wanted, shares = by_loops(module, x, earlier)
    assert_close(module(x, earlier=earlier).output, wanted)
    result = module(x, need_weights=True, earlier=earlier)
    assert_close(result.output, wanted)
    assert_close(result.weights, shares.sum(-1))
    assert_close(module.depth_weights(x, earlier), shares)


@torch.no_grad()
def test_the_last_layer_asks_and_the_others_answer() -> None:
    module, (x, earlier) = built(), tokens(5)
    clean = module(x, earlier=earlier).output
    for stream in range(4):
        changed = torch.cat([x[:, :, None], earlier], 2)
        changed[:, 2, stream] += 1.0
        moved = (module(changed[:, :, 0], earlier=changed[:, :, 1:]).output - clean).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == (
            [False, False, True, False, False] if stream == 0 else [False, False, True, True, True]
        )


@torch.no_grad()
def test_layers_are_told_apart_by_their_maps_alone() -> None:
    module, (x, earlier) = built(), tokens(5)
    swapped = earlier[:, :, [1, 0, 2]]
    assert (module(x, earlier=swapped).output - module(x, earlier=earlier).output).abs().max() > 1e-4
    module.features[1].load_state_dict(module.features[0].state_dict())
    assert_close(module(x, earlier=swapped).output, module(x, earlier=earlier).output)


@torch.no_grad()
def test_what_is_broken_below_reaches_no_earlier_token() -> None:
    module, (x, earlier) = built(), tokens(5)
    clean = module(x, earlier=earlier).output
    earlier[:, 3, 1] = torch.nan
    found = module(x, earlier=earlier).output
    assert_close(found[:, :3], clean[:, :3])
    assert found[:, 3:].isnan().all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="layer-shortcuts: layers=0"):
        LayerShortcuts(24, 8, layers=0)
    module, (x, earlier) = built(), tokens(5)
    for given in (earlier[:, :, 1:], earlier[:, 1:], earlier[..., 1:], None):
        with pytest.raises(ValueError, match=r"want \[2, 5, 3, 6\]|missing"):
            module(x, earlier=given)
