"""Hierarchies for images: a stem of convolutions, then stages of blocks at one size each, a step down between them.

    block: x + s1 mixer(norm(x)), then x + s2 mlp(norm(x)); the mechanism alone, where it is a whole block; the second
    half alone, where there is no mixer; or a bottleneck around the mixer

Maps are [b, height, width, e]. With a pixel mask every size is that of what is real, as if the image ended there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.cells import CellNorm, cell_mean, convolve, shown
from manyheads.functional.deformed import DeformedConv2d
from manyheads.functional.feature_maps import extent, rectangle, resized
from manyheads.models.class_tokens import ClassToken
from manyheads.models.layouts import STAGE
from manyheads.models.masks import real_places
from manyheads.models.stage_blocks import StageBlock, block_of, norm_of, normed

ACTIVATIONS = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Step(nn.Module):
    """norm -> convolution -> norm -> activation, to another size; deforms: of moved taps. pool: behind all that the
    maximum of 3 x 3 cells around every second one."""

    def __init__(self, dim: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.sizes = settings["kernel"], settings["stride"], settings["padding"]
        eps = () if settings["norm_eps"] is None else (settings["norm_eps"],) * 2
        self.before = norm_of(settings["before"], dim, *eps)
        more = {name: settings[name] for name in ("bias", "groups")}
        if more["groups"] < 1 or dim % more["groups"] or settings["features"] % more["groups"]:
            raise ValueError(
                f"a step of {dim} to {settings['features']} features with groups={more['groups']}; want a "
                "divisor of both"
            )
        self.pools = settings["pool"]
        if settings["deforms"]:
            if more["groups"] != 1:
                raise ValueError(f"a step that deforms, with groups={more['groups']}; want one group")
            self.conv: nn.Module = DeformedConv2d(dim, settings["features"], *self.sizes, bias=more["bias"])
        else:
            self.conv = nn.Conv2d(dim, settings["features"], *self.sizes, **more)
        self.after, self.act = norm_of(settings["after"], settings["features"], *eps), ACTIVATIONS[settings["act"]]()

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kernel, stride, padding = self.sizes
        if min(x.shape[1:3]) + 2 * padding < kernel:
            raise ValueError(
                f"a map of {x.shape[1]} x {x.shape[2]} is smaller than the kernel of {kernel}; want a larger image"
            )
        x = convolve(self.conv, normed(self.before, x, real), real)
        if real is not None:
            reach = (extent(real) + 2 * padding - kernel).clamp(min=0) // stride + 1
            real = rectangle(reach, x.shape[1:3])
        x = self.act(normed(self.after, x, real))
        return (x, real) if not self.pools else _largest_around(x, real)


def _largest_around(x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if real is None:
        return F.max_pool2d(x.movedim(-1, 1), 3, 2, 1).movedim(1, -1), None
    hidden = x.masked_fill(~real[..., None], -torch.inf)
    pooled = F.max_pool2d(hidden.movedim(-1, 1), 3, 2, 1).movedim(1, -1)
    real = rectangle((extent(real) + 1) // 2, pooled.shape[1:3])
    return shown(pooled, real), real


class Positions(nn.Module):
    """x + a vector learnt for each cell of a map of height x width, interpolated for maps of other sizes."""

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(*sizes, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        table = self.table.to(x.dtype)[None]
        if real is None:
            return x + resized(table, x.shape[1:3])
        return x + resized(table.expand(len(x), -1, -1, -1), x.shape[1:3], None, extent(real))


class Stage(nn.Module):
    """A step down, positions, blocks, and what stands between the first and the others (a residual of its own)."""

    def __init__(self, dim: int, stage: Mapping[str, Any]) -> None:
        super().__init__()
        down, mixers = stage["down"], stage["mixers"]
        self.down = None if down is None else Step(dim, {**down, "features": down["features"] or stage["dim"]})
        dim = dim if down is None else stage["dim"]
        self.positions = None if stage["positions"] is None else Positions(dim, stage["positions"])
        self.blocks = nn.ModuleList()
        for i in range(stage["depth"]):
            block = block_of(dim, stage, mixers[i % len(mixers)])
            self.blocks.append(block)
            dim = block.features
        between = stage["between"]
        self.between = None if between is None else StageBlock(dim, {**STAGE, "whole": True}, between)
        self.norm, self.features = norm_of(stage["norm_end"], dim, stage["norm_eps"]), dim

    def forward(self, x: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Any, ...]:
        weights, losses = [], []
        if self.down is not None:
            x, real = self.down(x, real)
        if self.positions is not None:
            x = self.positions(x, real)
        for i, block in enumerate(self.blocks):
            x, real, matrix, more = block(x, real, need_weights)
            weights.append(matrix)
            losses += more
            if i == 0 and self.between is not None:
                added, _, _, more = self.between(x, real)
                x, losses = x + added, losses + more
        return normed(self.norm, x, real), real, weights, losses


class StagedTrace(NamedTuple):
    """maps, reals: [b, height, width, e] after each stage, and what of it is real, [b, height, width] or None. weights:
    per block. aux_loss: the sum of all, None without any."""

    maps: tuple[Tensor, ...]
    reals: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    aux_loss: Tensor | None

    @property
    def last(self) -> Tensor:
        return self.maps[-1]

    @property
    def real(self) -> Tensor | None:
        return self.reals[-1]


class Hierarchy(nn.Module):
    """Stem and stages."""

    def __init__(self, layout: Mapping[str, Any], channels: int) -> None:
        super().__init__()
        dim, self.stem, self.stages = channels, nn.ModuleList(), nn.ModuleList()
        for step in layout["stem"]:
            self.stem.append(Step(dim, step))
            dim = step["features"]
        self.widths: list[int] = []
        for settings in layout["stages"]:
            stage = Stage(dim, settings)
            self.stages.append(stage)
            dim = stage.features
            self.widths.append(dim)
        self.features = dim

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, need_weights: bool = False
    ) -> StagedTrace:
        """pixel_values: [b, channels, height, width]; pixel_mask: [b, height, width], nonzero = real."""
        x, real = pixel_values.movedim(1, -1), None
        if pixel_mask is not None:
            if pixel_mask.shape != x.shape[:3]:
                raise ValueError(f"pixel_mask has shape {list(pixel_mask.shape)}; want {list(x.shape[:3])}")
            real = real_places("pixel_mask", pixel_mask)
            x = shown(x, real)
        for step in self.stem:
            x, real = step(x, real)
        maps: list[Tensor] = []
        reals, weights, losses = [], [], []
        for stage in self.stages:
            x, real, matrices, more = stage(x, real, need_weights)
            maps.append(x)
            reals.append(real)
            weights += matrices
            losses += more
        return StagedTrace(tuple(maps), tuple(reals), tuple(weights), torch.stack(losses).sum() if losses else None)


class HierarchyHead(nn.Module):
    """The mean over real cells, or a class token that has read them, a norm before it (of a norm over cells) or behind
    it, and one or two layers. A dense token's logits are raised by half of the most that a cell gives each label."""

    def __init__(self, dim: int, labels: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps, token = settings["hidden"], settings["norm_eps"], settings["token"]
        self.token = None if token is None else ClassToken(dim, eps, token)
        self.norm = norm_of(settings["norm"], dim, eps)
        self.up_proj = nn.Linear(dim, hidden) if hidden else None
        self.act = ACTIVATIONS[settings["act"]]()
        self.norm_hidden = nn.LayerNorm(hidden, eps=eps) if hidden and settings["norm_hidden"] else None
        self.classifier = nn.Linear(hidden or dim, labels)
        self.cell_classifier = nn.Linear(dim, labels) if token is not None and token["dense"] else None

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        if isinstance(self.norm, CellNorm):
            x = self.norm(x, real)
        pooled, cells = (cell_mean(x, real)[:, 0, 0], x) if self.token is None else self.token(x, real)
        if isinstance(self.norm, nn.LayerNorm):
            pooled = self.norm(pooled)
        if self.up_proj is not None:
            pooled = self.act(self.up_proj(pooled))
            pooled = pooled if self.norm_hidden is None else self.norm_hidden(pooled)
        logits: Tensor = self.classifier(pooled)
        if self.cell_classifier is None:
            return logits
        each = self.cell_classifier(self.norm(cells) if isinstance(self.norm, nn.LayerNorm) else cells)
        if real is not None:
            each = each.masked_fill(~real[..., None], -torch.inf)
        return logits + 0.5 * each.amax((1, 2))


class HierarchyPixels(nn.Module):
    """Each stage's map through a layer of its own, resized to the first stage's size, added up, normed, classified, and
    the logits resized to the image: the plainest dense head that every hierarchy can have."""

    def __init__(self, features: Sequence[int], labels: int) -> None:
        super().__init__()
        wide = features[0]
        self.projections = nn.ModuleList(nn.Linear(own, wide) for own in features)
        self.norm, self.classifier = nn.LayerNorm(wide), nn.Linear(wide, labels)

    def forward(
        self, maps: Sequence[Tensor], reals: Sequence[Tensor | None], size: Sequence[int], pixel_mask: Tensor | None
    ) -> Tensor:
        """-> [b, labels, *size]"""
        reaches = [None if real is None else extent(real) for real in reals]
        total = torch.zeros(())
        for x, reach, layer in zip(maps, reaches, self.projections, strict=True):
            part: Tensor = resized(layer(x), maps[0].shape[1:3], reach, reaches[0])
            total = part if total.ndim == 0 else total + part
        logits = self.classifier(F.gelu(self.norm(total)))
        whole = None if pixel_mask is None else extent(pixel_mask.bool())
        return resized(logits, tuple(size), reaches[0], whole).movedim(-1, 1)
