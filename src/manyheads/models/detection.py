"""Boxes and classes of what stands in an image, as a set: learnt queries read what the model below makes of it.

Shapes: b batch, q queries, m cells, e hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from manyheads.card import Pattern
from manyheads.functional.box_sets import WEIGHTS, set_losses
from manyheads.functional.feature_maps import extent
from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.images import ManyheadsOverImages
from manyheads.models.layers import ManyheadsBlock, Mixer
from manyheads.models.masks import Masks
from manyheads.models.stack import Stack


@dataclass
class ManyheadsObjectDetectionOutput(ModelOutput):
    """pred_boxes: [b, q, 4], middle x, middle y, width, height in parts of the (real) picture. decoder_*: of the
    queries; hidden_states and attentions: of the model below them."""

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor | None, ...] | None = None
    cross_attentions: tuple[Tensor | None, ...] | None = None
    aux_loss: Tensor | None = None


class ManyheadsForObjectDetection(ManyheadsOverImages):
    """A set of boxes. Patches and layers (or a hierarchy's last map) are memory; `num_queries` queries, each at a
    learnt point of the picture, read each other and the memory in num_decoder_layers layers, `decoder_layers` (softmax
    by default) and `cross_layers` (softmax by default); logits over num_labels classes and 'no box', and

        box = sigmoid(MLP(query) + [logit of its point, 0, 0])

    Source: DETR, arXiv:2005.12872 (assignment, losses, heads), its queries at points as in Anchor DETR,
    arXiv:2109.07107; without losses of the layers below the last. Unlike DETR's, positions (sines of places, in parts
    of the real picture) are added once, to memory and queries, as mechanisms here take no keys apart from values.
    """

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        dim, own = config.hidden_size, self.hierarchy
        self.neck = nn.Identity() if own is None else nn.Linear(own.features, dim)
        self.queries = nn.Embedding(config.num_queries, dim)
        self.points = nn.Parameter(_spread(config.num_queries))
        self.place = nn.Linear(dim, dim, bias=False)
        self.decoder = _decoder(config)
        self.classifier = nn.Linear(dim, config.num_labels + 1)
        self.box = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_mask: Tensor | None = None,
    ) -> ManyheadsObjectDetectionOutput:
        """labels: of each picture {"class_labels": [t], "boxes": [t, 4]}, as transformers' detectors take them. The
        loss is class + 5 l1 + 2 giou. pixel_mask: of a hierarchy; boxes are in parts of what is real then. Labels with
        a `size` that is the padded one, as transformers' processors make them, have theirs in parts of that."""
        wants = self._wants(output_attentions, output_hidden_states)
        maps, weights, aux_loss, real = self._below(pixel_values, pixel_mask, wants)
        last: Tensor = self.neck(maps[-1])
        memory = last.flatten(1, 2) + self.place(_sines(_places(last, real), last.shape[-1]).to(last))
        asked = self.queries.weight + self.place(_sines(self.points.sigmoid()[None], last.shape[-1]).to(last))
        masks = Masks(context_mask=None if real is None else real.flatten(1))
        trace = self.decoder(asked.expand(len(memory), -1, -1), memory, masks, **wants)
        logits, moved = self.classifier(trace.last), self.box(trace.last)
        boxes = (moved + nn.functional.pad(self.points, (0, 2)).to(moved.dtype)).sigmoid()
        losses = [loss for loss in (aux_loss, trace.aux_loss) if loss is not None]
        aux_loss = torch.stack(losses).sum() if losses else None
        parts = None
        if labels is not None:
            reach = None if pixel_mask is None else extent(pixel_mask.bool())
            parts = set_losses(logits, boxes, *self._padded(labels, logits, pixel_values.shape[2:], reach))
        loss = None if parts is None else torch.stack([WEIGHTS[key] * part for key, part in parts.items()]).sum()
        return ManyheadsObjectDetectionOutput(
            self._with_router_loss(loss, aux_loss),
            parts,
            logits,
            boxes,
            trace.last,
            maps if wants["output_hidden_states"] else None,
            weights if wants["output_attentions"] else None,
            trace.hidden_states,
            trace.attentions,
            trace.cross_attentions,
            aux_loss,
        )

    def _below(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, wants: dict[str, bool]
    ) -> tuple[tuple[Tensor, ...], Any, Tensor | None, Tensor | None]:
        """Maps [b, rows, columns, e], weights, the auxiliary loss, and what is real of the last map."""
        if self.hierarchy is not None:
            staged = self._staged(pixel_values, pixel_mask, wants)
            return staged.maps, staged.weights, staged.aux_loss, staged.real
        self._no_pixel_mask(pixel_mask)
        trace = self.stack(self.embed_patches(self._patches(pixel_values)).flatten(1, 2), **wants)
        states = trace.hidden_states or (trace.last,)
        maps = tuple(state.unflatten(1, self.config.patch_grid) for state in states)
        return maps, trace.attentions, trace.aux_loss, None

    def _padded(
        self, labels: Sequence[Mapping[str, Tensor]], logits: Tensor, size: Sequence[int], reach: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Classes [b, t], -1 where a picture has fewer, and boxes [b, t, 4], of pictures of this size, of which `reach`
        [b, 2] is real."""
        if len(labels) != len(logits):
            raise ValueError(f"labels of {len(labels)} pictures for {len(logits)}; want one mapping for each")
        checked = [self._checked(f"labels[{row}]", own) for row, own in enumerate(labels)]
        most = max((len(kinds) for kinds, _ in checked), default=0)
        classes = torch.full((len(labels), most), -1, device=logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)  # half precision would move the boxes
        boxes = torch.zeros(len(labels), most, 4, dtype=wide, device=logits.device)
        for row, (kinds, places) in enumerate(checked):
            told = labels[row].get("size")
            if reach is not None and told is not None and [int(side) for side in told] == [*size]:
                places = places * (torch.tensor([*size]) / reach[row].cpu()).flip(0).repeat(2).to(places)
            classes[row, : len(kinds)], boxes[row, : len(kinds)] = kinds, places
        return classes, boxes

    def _checked(self, place: str, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        for what, axes, sort in (("class_labels", 1, "integers [t]"), ("boxes", 2, "floats [t, 4]")):
            given = own.get(what) if isinstance(own, Mapping) else None
            fits = isinstance(given, Tensor) and (given.is_floating_point() == (axes == 2) or not given.numel())
            if not isinstance(given, Tensor) or not fits or (given.ndim != axes and given.numel()):
                found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"{place}: {what} {found}; want a mapping with them as a tensor of {sort}")
        kinds, places = own["class_labels"], own["boxes"]
        if places.shape != (len(kinds), 4):
            raise ValueError(f"{place}: boxes {list(places.shape)}; want [{len(kinds)}, 4], one per class")
        if len(kinds) and not bool(((kinds >= 0) & (kinds < self.config.num_labels)).all()):
            raise ValueError(f"{place}: classes {kinds.tolist()}; want 0 to {self.config.num_labels - 1}")
        # Some boxes stand out over the rim; those in pixels are further away.
        if not bool(((places > -1) & (places < 2)).all() & (places[:, 2:] >= 0).all()):
            raise ValueError(
                f"{place}: boxes {places.tolist()}; want middle x, middle y, width and height in parts of the picture, "
                "from 0 to 1"
            )
        return kinds, places


def _decoder(config: ManyheadsConfig) -> Stack:
    """Queries are a set and know their places: no positions of a sequence, and no convolution along them."""
    own = copy.copy(config)
    own.positions, own.short_conv = "none", 0
    selves = config.decoder_specs() if config.decoder_layers is not None else ["softmax"] * config.num_decoders
    blocks = []
    for i, (spec, cross) in enumerate(zip(selves, config.cross_specs(), strict=True)):
        mixers = (
            Mixer(own, f"decoder_layers[{i}]", spec, Pattern.NONCAUSAL_SELF),
            Mixer(own, f"cross_layers[{i}]", cross, Pattern.NONCAUSAL_CROSS),
        )
        blocks.append(ManyheadsBlock(own, *mixers))
    return Stack(own, blocks)


def _spread(count: int) -> Tensor:
    """[count, 2]: logits of points in rows over the whole picture."""
    rows = max(1, math.isqrt(count))
    each = [count // rows + (row < count % rows) for row in range(rows)]
    points = [((i + 0.5) / many, (row + 0.5) / rows) for row, many in enumerate(each) for i in range(many)]
    return torch.logit(torch.tensor(points))


def _places(x: Tensor, real: Tensor | None) -> Tensor:
    """x [b, height, width, e] -> [1 or b, m, 2], of each cell x and y in parts of what is real."""
    height, width = x.shape[1:3]
    sizes = torch.tensor([[height, width]]) if real is None else extent(real).clamp(min=1)
    rows, columns = torch.arange(height, device=x.device) + 0.5, torch.arange(width, device=x.device) + 0.5
    sizes = sizes.to(rows)
    down, along = rows / sizes[:, :1], columns / sizes[:, 1:]
    wide = torch.stack([along[:, None].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width)], -1)
    return wide.flatten(1, 2)


def _sines(places: Tensor, dim: int) -> Tensor:
    """places [b, m, 2] in parts -> [b, m, dim]: sine and cosine of each, at wave lengths from 1/10 of the picture to
    four of it; what of dim is no multiple of four is zero."""
    count = max(1, dim // 4)
    rate = 2 * math.pi * torch.logspace(math.log10(0.25), 1.0, count, device=places.device)
    angle = (places[..., None] * rate).flatten(-2)
    found = torch.cat([angle.sin(), angle.cos()], -1)[..., :dim]
    return nn.functional.pad(found, (0, dim - found.shape[-1]))
