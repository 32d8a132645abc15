"""Labels for tokens: names in a text, or the bytes behind a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.losses import token_loss
from manyheads.models.modeling import ManyheadsModel, ManyheadsPreTrainedModel


@dataclass
class ManyheadsTokenClassifierOutput(TokenClassifierOutput):
    aux_loss: Tensor | None = None


class ManyheadsForTokenClassification(ManyheadsPreTrainedModel):
    """A label for each token. Layers are noncausal where their mechanism is, unless is_causal says otherwise."""

    # How its body is made; a configuration does not say.
    body: ClassVar[dict[str, Any]] = {"causal": None, "decodes": False}

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.model = ManyheadsModel(config, **self.body)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        token_type_ids: Any = None,
        cache_position: Any = None,
        token_kinds: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> ManyheadsTokenClassifierOutput:
        """labels: [b, n] classes, aligned with the tokens, -100 where nothing is asked. num_items_in_batch: of how many
        labels the loss is the mean, where several batches make a step. Positions that do not count up by one begin
        another document, as in ManyheadsModel; token_kinds, boxes: as there."""
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            token_kinds=token_kinds,
            boxes=boxes,
            return_dict=True,
        )
        logits, loss, share = self.classifier(out.last_hidden_state), None, 1.0
        if labels is not None:
            loss, share = token_loss(logits, labels, num_items_in_batch)
        return ManyheadsTokenClassifierOutput(
            self._with_router_loss(loss, out.aux_loss, share), logits, out.hidden_states, out.attentions, out.aux_loss
        )
