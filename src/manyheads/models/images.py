"""Models for images: labels for the whole, and for every pixel.

Shapes: b batch, e hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput, SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.heads import Pooling, sum_losses
from manyheads.models.layers import build_stack
from manyheads.models.modeling import ManyheadsPreTrainedModel


@dataclass
class ManyheadsImageClassifierOutput(ImageClassifierOutput):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSemanticSegmenterOutput(SemanticSegmenterOutput):
    aux_loss: Tensor | None = None


class ManyheadsOverPatches(ManyheadsPreTrainedModel):
    """Images cut into patches that stand in a grid: a mechanism for grids sees it, others the sequence of its rows.
    is_causal as in ManyheadsForSequenceClassification."""

    main_input_name = "pixel_values"
    _input_embed_layer = "embed_patches"
    input_modalities = ("image",)

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.embed_patches = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.stack = build_stack(config, config.is_causal, images=True)

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


class ManyheadsForImageClassification(ManyheadsOverPatches):
    """Labels for whole images: the patches' pooled states, classified."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.pooling = Pooling(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
    ) -> ManyheadsImageClassifierOutput:
        """pixel_values: [b, channels, height, width]. labels: as in ManyheadsForSequenceClassification."""
        wants = self._wants(output_attentions, output_hidden_states)
        trace = self.stack(self.embed_patches(self._patches(pixel_values)).flatten(1, 2), **wants)
        pooled = self.pooling(trace.last, None)
        logits, aux_loss = self.classifier(pooled.output), sum_losses(trace.aux_loss, pooled)
        loss, share = self._label_loss(labels, logits, num_items_in_batch)
        return ManyheadsImageClassifierOutput(
            self._with_router_loss(loss, aux_loss, share), logits, trace.hidden_states, trace.attentions, aux_loss
        )


class ManyheadsForSemanticSegmentation(ManyheadsOverPatches):
    """Labels for pixels: each patch's state gives the logits of all of its pixels."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels * config.patch_size**2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
    ) -> ManyheadsSemanticSegmenterOutput:
        """pixel_values: [b, channels, height, width]. labels: [b, height, width], -100 where nothing is asked. logits:
        [b, labels, height, width]."""
        wants = self._wants(output_attentions, output_hidden_states)
        trace = self.stack(self.embed_patches(self._patches(pixel_values)).flatten(1, 2), **wants)
        side = self.config.patch_size
        each = self.classifier(trace.last).unflatten(1, self.config.patch_grid).unflatten(-1, (-1, side, side))
        logits = each.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        loss, share = None, 1.0
        if labels is not None:
            summed = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
            asked = (labels != -100).sum().clamp(min=1)
            loss = summed / (asked if num_items_in_batch is None else num_items_in_batch)
        return ManyheadsSemanticSegmenterOutput(
            self._with_router_loss(loss, trace.aux_loss, share),
            logits,
            trace.hidden_states,
            trace.attentions,
            trace.aux_loss,
        )
