"""Blocks of a hierarchy's stages, over maps [b, height, width, e]: a mechanism and what stands around it.

real: [b, height, width], True = real, or None where every cell is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from manyheads.card import Pattern
from manyheads.functional.cells import CellNorm, convolve, depthwise
from manyheads.functional.feature_maps import extent, rectangle
from manyheads.mechanism import Mechanism, Result
from manyheads.models.configuration import Spec, spec_arguments, spec_name
from manyheads.models.layers import housed_mechanism
from manyheads.models.layouts import NO_MIXER


def norm_of(kind: str, dim: int, eps: float = 1e-6, batch_eps: float = 1e-5) -> nn.Module | None:
    if kind == "none":
        return None
    return CellNorm(dim, eps=batch_eps) if kind == "batch" else nn.LayerNorm(dim, eps=eps)


def normed(norm: nn.Module | None, x: Tensor, real: Tensor | None) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x, real) if isinstance(norm, CellNorm) else norm(x)
    return normed


class CellMLP(nn.Module):
    """Two layers with GELU; convolved: with a 3 x 3 convolution of each feature in front of it."""

    def __init__(self, dim: int, hidden: int, convolved: bool) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = depthwise(hidden, 3) if convolved else None

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        hidden = self.up_proj(x)
        hidden = hidden if self.conv is None else convolve(self.conv, hidden, real)
        output: Tensor = self.down_proj(F.gelu(hidden))
        return output


def in_reading_order(mechanism: Mechanism, x: Tensor, real: Tensor | None, need_weights: bool) -> Result:
    """A mechanism for sequences over the cells of a map, row by row; real ones stand next to each other, as in the map
    that ends where they do, and all padding behind them."""
    rows = x.flatten(1, 2)
    if real is None:
        result = mechanism(rows, need_weights=need_weights)
        return result._replace(output=result.output.unflatten(1, tuple(x.shape[1:3])))
    there = real.flatten(1)
    order = (~there).to(torch.uint8).argsort(dim=1, stable=True)
    back = order.argsort(1)
    result = mechanism(_moved(rows, order), mask=there.gather(1, order), need_weights=need_weights)
    output, weights = _moved(result.output, back).unflatten(1, tuple(x.shape[1:3])), result.weights
    if weights is not None:
        places = back[:, None, :, None].expand(weights.shape)
        weights = weights.gather(2, places).gather(3, places.mT)
    return result._replace(output=output, weights=weights)


def _over_cells(dim: int, stage: Mapping[str, Any], spec: Spec) -> Mechanism:
    arguments = {"heads": stage["heads"], "causal": False, **spec_arguments(spec)}
    mechanism = housed_mechanism("stages", spec_name(spec), dim, arguments.pop("heads"), arguments)
    declared = mechanism.card.patterns
    if not {Pattern.GRID, Pattern.NONCAUSAL_SELF} & set(declared):
        raise ValueError(
            f"stages: {spec_name(spec)!r} declares {sorted(declared)}; a stage wants mechanisms for a grid, or "
            "noncausal ones, to which its cells are a sequence"
        )
    return mechanism


def _mixed(mechanism: Mechanism, x: Tensor, real: Tensor | None, need_weights: bool) -> Result:
    if Pattern.GRID in mechanism.card.patterns:
        return mechanism(x, mask=real, need_weights=need_weights)
    return in_reading_order(mechanism, x, real, need_weights)


def _reached(mechanism: Mechanism, real: Tensor | None, before: Tensor, after: Tensor) -> Tensor | None:
    """What is real of a result of another size."""
    if real is None or before.shape[1:3] == after.shape[1:3]:
        return real
    reach = [mechanism.result_size(*map(int, size)) for size in extent(real)]
    return rectangle(torch.tensor(reach, device=real.device), after.shape[1:3])


def _moved(rows: Tensor, places: Tensor) -> Tensor:
    return rows.gather(1, places[..., None].expand_as(rows))


class StageBlock(GradientCheckpointingLayer):
    """One mechanism, and what stands around it unless it is a whole block. dim: the features of x."""

    def __init__(self, dim: int, stage: Mapping[str, Any], spec: Spec) -> None:
        super().__init__()
        self.mechanism = _over_cells(dim, stage, spec)
        self.features = self.mechanism.result_dim or dim
        self.mlp: CellMLP | None = None
        if stage["whole"]:
            return
        self.norm, self.norm_mlp = (norm_of(stage["norm"], dim, stage["norm_eps"]) for _ in range(2))
        if stage["mlp_ratio"]:
            self.mlp = CellMLP(dim, int(dim * stage["mlp_ratio"]), stage["mlp"] == "convolved")
        scale = stage["layer_scale"]
        self.scale, self.scale_mlp = (
            (nn.Parameter(torch.full((dim,), float(scale))) if scale is not None else None) for _ in range(2)
        )

    def forward(self, x: Tensor, real: Tensor | None, need_weights: bool = False) -> tuple[Any, ...]:
        """The map, what of it is real, weights where asked for, and auxiliary losses."""
        if not hasattr(self, "norm"):
            result = _mixed(self.mechanism, x, real, need_weights)
            return (
                result.output,
                _reached(self.mechanism, real, x, result.output),
                result.weights,
                list(result.losses.values()),
            )
        result = _mixed(self.mechanism, normed(self.norm, x, real), real, need_weights)
        x = x + (result.output if self.scale is None else self.scale * result.output)
        if self.mlp is not None:
            added = self.mlp(normed(self.norm_mlp, x, real), real)
            x = x + (added if self.scale_mlp is None else self.scale_mlp * added)
        return x, real, result.weights, list(result.losses.values())


class MLPBlock(GradientCheckpointingLayer):
    """x + s mlp(norm(x)): a block without a mixer."""

    mechanism: Mechanism | None = None

    def __init__(self, dim: int, stage: Mapping[str, Any]) -> None:
        super().__init__()
        self.features, scale = dim, stage["layer_scale"]
        self.norm = norm_of(stage["norm"], dim, stage["norm_eps"])
        self.mlp = CellMLP(dim, int(dim * stage["mlp_ratio"]), stage["mlp"] == "convolved")
        self.scale = None if scale is None else nn.Parameter(torch.full((dim,), float(scale)))

    def forward(self, x: Tensor, real: Tensor | None, need_weights: bool = False) -> tuple[Any, ...]:
        """As of a StageBlock."""
        added = self.mlp(normed(self.norm, x, real), real)
        return x + (added if self.scale is None else self.scale * added), real, None, []


class Bottleneck(GradientCheckpointingLayer):
    """ReLU(shortcut(x) + widen(ReLU(norm(mixer(ReLU(narrow(x))))))), narrow and widen linear layers with a norm behind
    them, as of a ResNet whose convolution is a mixer. dim: the features of x. The shortcut is x itself, or a layer and
    its norm where features or size change, of every so-manieth cell as the mixer's stride has it.

    Source: the self-attention blocks of timm's byobnet.py, which HaloNet is built of there.
    """

    def __init__(self, dim: int, stage: Mapping[str, Any], spec: Spec) -> None:
        super().__init__()
        inside, self.features = int(stage["dim"] * stage["bottleneck"]), stage["dim"]
        self.mechanism = _over_cells(inside, stage, spec)
        self.stride = 64 // self.mechanism.result_size(64, 64)[0]
        self.narrow, self.widen = nn.Linear(dim, inside, bias=False), nn.Linear(inside, self.features, bias=False)
        self.norm_narrow, self.norm_mixed, self.norm_wide = (CellNorm(own) for own in (inside, inside, self.features))
        same = dim == self.features and self.stride == 1
        self.shortcut = None if same else nn.Linear(dim, self.features, bias=False)
        self.norm_shortcut = None if same else CellNorm(self.features)

    def forward(self, x: Tensor, real: Tensor | None, need_weights: bool = False) -> tuple[Any, ...]:
        """As of a StageBlock."""
        result = _mixed(self.mechanism, F.relu(self.norm_narrow(self.narrow(x), real)), real, need_weights)
        reached = _reached(self.mechanism, real, x, result.output)
        output = self.norm_wide(self.widen(F.relu(self.norm_mixed(result.output, reached))), reached)
        if self.shortcut is not None:
            x = normed(self.norm_shortcut, self.shortcut(x[:, :: self.stride, :: self.stride]), reached)
        return F.relu(x + output), reached, result.weights, list(result.losses.values())


def block_of(dim: int, stage: Mapping[str, Any], spec: Spec) -> StageBlock | MLPBlock | Bottleneck:
    """The block that a stage's settings ask for. dim: the features of what it is given."""
    if spec == NO_MIXER:
        return MLPBlock(dim, stage)
    return StageBlock(dim, stage, spec) if stage["bottleneck"] is None else Bottleneck(dim, stage, spec)
