"""Models for images: labels for the whole, and for every pixel.

Shapes: b batch, e hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput, SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.heads import Pooling, sum_losses
from manyheads.models.losses import token_loss
from manyheads.models.modeling import ManyheadsPreTrainedModel
from manyheads.models.stack import build_stack
from manyheads.models.stages import Hierarchy, HierarchyHead, HierarchyPixels, StagedTrace


@dataclass
class ManyheadsImageClassifierOutput(ImageClassifierOutput):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSemanticSegmenterOutput(SemanticSegmenterOutput):
    aux_loss: Tensor | None = None


class ManyheadsOverImages(ManyheadsPreTrainedModel):
    """Images cut into patches that stand in a grid: a mechanism for grids sees it, others the sequence of its rows.
    is_causal as in ManyheadsForSequenceClassification. Where the configuration has `stages`, a hierarchy of maps."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.hierarchy: Hierarchy | None = None
        if config.stages is not None:
            self.hierarchy = Hierarchy(config.stages, config.num_channels)
            return
        self.embed_patches = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.stack = build_stack(config, config.is_causal, images=True)

    def get_input_embeddings(self) -> nn.Module:
        if self.hierarchy is None:
            return self.embed_patches
        conv: nn.Module = self.hierarchy.stem[0].conv  # type: ignore[assignment]
        return conv

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.hierarchy is None:
            self.embed_patches = value  # type: ignore[assignment]
        else:
            self.hierarchy.stem[0].conv = value

    def _staged(self, pixel_values: Tensor, pixel_mask: Tensor | None, wants: dict[str, bool]) -> StagedTrace:
        """Of a hierarchy, and the sum of its auxiliary losses in place of the list."""
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; want [batch, {channels}, height, width]"
            )
        assert self.hierarchy is not None
        return self.hierarchy(pixel_values.to(self.dtype), pixel_mask, wants["output_attentions"])

    def _no_pixel_mask(self, pixel_mask: Tensor | None) -> None:
        if pixel_mask is not None:
            raise ValueError(
                f"{type(self).__name__}: a pixel_mask, where patches stand at places of a fixed grid; leave it out, or "
                "build the model with `stages`"
            )

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """[b, c, height, width] -> [b, rows, columns, c * patch * patch]."""
        wanted = (self.config.num_channels, *self.config.image_shape)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; want [batch, {', '.join(map(str, wanted))}]"
            )
        side = self.config.patch_size
        cut = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).to(self.dtype)


class ManyheadsForImageClassification(ManyheadsOverImages):
    """Labels for whole images: pooled states, classified."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        if self.hierarchy is None:
            self.pooling = Pooling(config)
            self.classifier: nn.Module = nn.Linear(config.hidden_size, config.num_labels)
        else:
            self.classifier = HierarchyHead(self.hierarchy.features, config.num_labels, config.stages["head"])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        pixel_mask: Tensor | None = None,
    ) -> ManyheadsImageClassifierOutput:
        """pixel_values: [b, channels, height, width]. labels: as in ManyheadsForSequenceClassification. pixel_mask: [b,
        height, width], nonzero = real, of a hierarchy, whose hidden states are the maps after each stage."""
        wants = self._wants(output_attentions, output_hidden_states)
        if self.hierarchy is not None:
            staged = self._staged(pixel_values, pixel_mask, wants)
            logits, aux_loss = self.classifier(staged.last, staged.real), staged.aux_loss
            loss, share = self._label_loss(labels, logits, num_items_in_batch)
            hidden = staged.maps if wants["output_hidden_states"] else None
            weights = staged.weights if wants["output_attentions"] else None
            loss = self._with_router_loss(loss, aux_loss, share)
            return ManyheadsImageClassifierOutput(loss, logits, hidden, weights, aux_loss)
        self._no_pixel_mask(pixel_mask)
        asked = wants["output_hidden_states"]
        wants["output_hidden_states"] = asked or self.pooling.reads_below
        trace = self.stack(self.embed_patches(self._patches(pixel_values)).flatten(1, 2), **wants)
        pooled, hidden = self.pooling(trace.last, None, trace.hidden_states), trace.hidden_states if asked else None
        logits, aux_loss = self.classifier(pooled.output), sum_losses(trace.aux_loss, pooled)
        loss, share = self._label_loss(labels, logits, num_items_in_batch)
        return ManyheadsImageClassifierOutput(
            self._with_router_loss(loss, aux_loss, share), logits, hidden, trace.attentions, aux_loss
        )


class ManyheadsForSemanticSegmentation(ManyheadsOverImages):
    """Labels for pixels: each patch's state gives the logits of all of its pixels; in a hierarchy, the maps of all
    stages at the size of the first, added up."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        if self.hierarchy is None:
            self.classifier: nn.Module = nn.Linear(config.hidden_size, config.num_labels * config.patch_size**2)
        else:
            self.classifier = HierarchyPixels(self.hierarchy.widths, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        pixel_mask: Tensor | None = None,
    ) -> ManyheadsSemanticSegmenterOutput:
        """pixel_values: [b, channels, height, width]. labels: [b, height, width], -100 where nothing is asked. logits:
        [b, labels, height, width]. pixel_mask: of a hierarchy; what is padded has logits of no meaning, and no label of
        it counts."""
        wants = self._wants(output_attentions, output_hidden_states)
        hidden: Any
        if self.hierarchy is not None:
            staged = self._staged(pixel_values, pixel_mask, wants)
            logits = self.classifier(staged.maps, staged.reals, pixel_values.shape[2:], pixel_mask)
            hidden, weights, aux_loss = staged.maps, staged.weights, staged.aux_loss
        else:
            self._no_pixel_mask(pixel_mask)
            trace = self.stack(self.embed_patches(self._patches(pixel_values)).flatten(1, 2), **wants)
            side = self.config.patch_size
            each = self.classifier(trace.last).unflatten(1, self.config.patch_grid).unflatten(-1, (-1, side, side))
            logits = each.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
            hidden, weights, aux_loss = trace.hidden_states, trace.attentions, trace.aux_loss
        loss, share = None, 1.0
        if labels is not None:
            real = None if pixel_mask is None else pixel_mask.bool()
            loss, share = token_loss(logits.movedim(1, -1), labels, num_items_in_batch, real)
        return ManyheadsSemanticSegmenterOutput(
            self._with_router_loss(loss, aux_loss, share),
            logits,
            hidden if wants["output_hidden_states"] else None,
            weights if wants["output_attentions"] else None,
            aux_loss,
        )
