"""Models for a task: causal and encoder-decoder language models, and sequence classifiers.

Shapes: b batch, n tokens, e hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from manyheads.cache_names import CACHE_NAME, CACHE_NAMES, cache_of, given_cache, takes_cache
from manyheads.card import Pattern
from manyheads.mechanism import Result
from manyheads.models.beside import GIVEN, continued, of_last
from manyheads.models.cache import ManyheadsCache
from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.layers import build_mechanism
from manyheads.models.losses import token_loss
from manyheads.models.masks import real_tokens
from manyheads.models.modeling import ManyheadsModel, ManyheadsPreTrainedModel, ManyheadsSeq2SeqModel
from manyheads.models.packed import Packing, find_documents

logger = logging.get_logger(__name__)


@dataclass
class ManyheadsCausalLMOutput(CausalLMOutputWithPast):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSeq2SeqLMOutput(Seq2SeqLMOutput):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSequenceClassifierOutput(SequenceClassifierOutput):
    aux_loss: Tensor | None = None


class ManyheadsGenerationMixin(GenerationMixin):
    """`generate` with mechanisms' states for a cache. A model with a mechanism that cannot decode step by step runs
    without one, recomputing every step."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: the layers decide what is kept; "
                "leave it out"
            )
        cache, why = given_cache(model_kwargs), self._uncached(generation_config)
        if why is not None:
            seen = 0 if cache is None else cache.get_seq_length()
            if seen:
                raise ValueError(
                    f"generate: {why}, and past_key_values has seen {seen} tokens; leave it out and give all tokens"
                )
            if model_kwargs.get("inputs_embeds") is not None and not self.config.is_encoder_decoder:
                raise ValueError(
                    f"generate: {why}, and inputs_embeds are passed once, for a cache to remember; give input_ids"
                )
            generation_config.use_cache = False
            for name in CACHE_NAMES:
                model_kwargs.pop(name, None)
            return
        if cache is None:
            cache = model_kwargs[CACHE_NAME] = ManyheadsCache(self.decoder_stack.memories)
        else:
            cache._is_user_defined = True
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def _uncached(self, generation_config: Any) -> str | None:
        """Why generate goes without a cache, None where it has one."""
        stack = self.decoder_stack
        if generation_config.use_cache is False:
            return "use_cache=False"
        why = f"{stack.obstacle}, cannot decode step by step" if stack.obstacle else None
        if why is None and stack.forgets:
            why = "checkpointed layers keep no states in training"
        if why is None and generation_config.output_attentions:
            why = stack.weights_obstacle()
        if why is not None:
            logger.warning_once(f"{why}: generating without a cache")
        return why

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{type(self).__name__}: continuous batching (generate_batch) pages keys and values, and mechanisms keep "
            "states of their own; call generate with rows padded on the left and an attention_mask"
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads its arguments' names
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        made = super().prepare_inputs_for_generation(*args, **kwargs)
        made.pop("tokenizer", None)  # that of stop strings, which transformers hands on to forward
        for name in GIVEN:
            if (given := made.get(name)) is not None:
                tokens = made["inputs_embeds"] if made.get("input_ids") is None else made["input_ids"]
                past = given_cache(made)
                made[name] = of_last(name, given, 0 if past is None else past.get_seq_length(), tokens)
        return made

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: Any, is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> Any:
        told = super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        longer = {name: continued(told[name], num_new_tokens) for name in GIVEN if told.get(name) is not None}
        return {**told, **longer}


class Shifted(TypedDict, total=False):
    """Taken beside the named arguments: Trainer holds every parameter named after labels for one that it must have."""

    shift_labels: Tensor | None


def shifted(labels: Tensor | None, beside: Shifted) -> Tensor | None:
    """What each token is to predict: [b, n], as given, or the labels one place to the left."""
    unknown = sorted(beside.keys() - Shifted.__annotations__.keys())
    if unknown:
        raise TypeError(f"ManyheadsForCausalLM.forward() got an unexpected keyword argument {unknown[0]!r}")
    found = beside.get("shift_labels")
    return F.pad(labels[:, 1:], (0, 1), value=-100) if found is None and labels is not None else found


class ManyheadsForCausalLM(ManyheadsPreTrainedModel, ManyheadsGenerationMixin):
    """Next-token prediction; every layer must declare causal-self."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        if config.is_causal is False:
            raise ValueError("is_causal=False would show ManyheadsForCausalLM the token to predict; use True or None")
        self.model = ManyheadsModel(config, causal=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ManyheadsCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Any = None,
        cache_position: Any = None,
        token_kinds: Tensor | None = None,
        boxes: Tensor | None = None,
        **beside: Unpack[Shifted],
    ) -> ManyheadsCausalLMOutput:
        """labels: [b, n] as input_ids (they are shifted here), -100 = not predicted: in packed rows the first token of
        each document, which the one before it would else predict. shift_labels: [b, n], shifted already, and taken
        before labels, as by transformers. All else as in ManyheadsModel; in generate, token_kinds and boxes are those
        of the prompt, and what is generated has the kind and the box of its last token."""
        wanted = shifted(labels, beside)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            seq_idx,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            token_kinds=token_kinds,
            boxes=boxes,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        logits, loss, share = self._capped(logits), None, 1.0
        if wanted is not None:
            loss, share = token_loss(logits, wanted, num_items_in_batch)
        return ManyheadsCausalLMOutput(
            self._with_router_loss(loss, out.aux_loss, share),
            logits,
            cache_of(out),
            out.hidden_states,
            out.attentions,
            out.aux_loss,
        )


class ManyheadsForSeq2SeqLM(ManyheadsPreTrainedModel, ManyheadsGenerationMixin):
    """An encoder-decoder language model."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.model = ManyheadsSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self.config.decoder_causal:
            raise ValueError("decoder_causal=False: decoder tokens see each other, so there is no order to generate in")
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Without the encoder's auxiliary loss, which has no rows to repeat for beams and samples."""
        outputs = kwargs.get("encoder_outputs")
        if isinstance(outputs, dict):
            kwargs["encoder_outputs"] = type(outputs)(**{k: v for k, v in outputs.items() if k != "aux_loss"})
        return super()._expand_inputs_for_generation(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels one place to the right, after the start token."""
        config = self.config
        start = next((t for t in (config.decoder_start_token_id, config.bos_token_id) if t is not None), None)
        if start is None:
            raise ValueError("decoder inputs are made of labels only with decoder_start_token_id or bos_token_id set")
        filled = labels.masked_fill(labels == -100, start if config.pad_token_id is None else config.pad_token_id)
        return F.pad(filled[:, :-1], (1, 0), value=start)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: ManyheadsCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        token_type_ids: Any = None,
        cache_position: Any = None,
    ) -> ManyheadsSeq2SeqLMOutput:
        """labels: [b, n], aligned with the decoder's tokens, which by default are the labels moved one to the right."""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            if not self.config.decoder_causal:
                raise ValueError(
                    "decoder_causal=False: inputs made of the labels would show them; give decoder_input_ids"
                )
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        out = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        logits, loss, share = self._capped(self.lm_head(out.last_hidden_state)), None, 1.0
        if labels is not None:
            loss, share = token_loss(logits, labels, num_items_in_batch)
        kept = {k: v for k, v in out.items() if k != "last_hidden_state"}
        return ManyheadsSeq2SeqLMOutput(loss=self._with_router_loss(loss, out.aux_loss, share), logits=logits, **kept)


class Pooling(nn.Module):
    """[b, n, e] -> [b, e]: the mean over real tokens, or a mechanism that pools."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        learned = config.pooling != "mean"
        self.mechanism = build_mechanism(config, "pooling", config.pooling, Pattern.POOL) if learned else None

    @property
    def reads_below(self) -> bool:
        """Whether it reads the outputs of the layers below the last."""
        return self.mechanism is not None and "earlier" in self.mechanism.card.takes

    def forward(self, x: Tensor, real: Tensor | None, hidden_states: Sequence[Tensor] | None = None) -> Result:
        """hidden_states: the embeddings, and the outputs of all layers, which it is given where it `reads_below`."""
        if self.mechanism is not None:
            below = hidden_states[1:-1] if hidden_states is not None and self.reads_below else None
            earlier = {"earlier": torch.stack([*below], 2) if below else x[:, :, None][:, :, :0]}
            return self.mechanism(x, mask=real, **(earlier if self.reads_below else {}))
        if real is None:
            return Result(x.mean(1))
        return Result(x.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True).clamp(min=1).to(x.dtype))


def sum_losses(trace_loss: Tensor | None, pooled: Result) -> Tensor | None:
    losses = [*([] if trace_loss is None else [trace_loss]), *pooled.losses.values()]
    return torch.stack(losses).sum() if losses else None


class ManyheadsForSequenceClassification(ManyheadsPreTrainedModel):
    """Labels for whole sequences. Layers are noncausal where their mechanism is, unless is_causal says otherwise."""

    # How its body is made; a configuration does not say.
    body: ClassVar[dict[str, Any]] = {"causal": None, "decodes": False}

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.model = ManyheadsModel(config, **self.body)
        self.pooling = Pooling(config)
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
    ) -> ManyheadsSequenceClassifierOutput:
        """labels: [b] classes, or [b, num_labels] targets (config.problem_type, as in transformers).
        num_items_in_batch: of how many classes the loss is the mean, where several batches make a step. token_kinds,
        boxes: as in ManyheadsModel."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None and find_documents(position_ids, attention_mask, tokens, Packing()):
            raise ValueError(
                "position_ids do not count up by one: several documents in a row that gets one label; give each "
                "document a row of its own"
            )
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=self.pooling.reads_below or output_hidden_states,
            token_kinds=token_kinds,
            boxes=boxes,
            return_dict=True,
        )
        pooled = self.pooling(out.last_hidden_state, real_tokens(attention_mask), out.hidden_states)
        logits, aux_loss = self.classifier(pooled.output), sum_losses(out.aux_loss, pooled)
        loss, share = self._label_loss(labels, logits, num_items_in_batch)
        hidden = out.hidden_states if self._wants(None, output_hidden_states)["output_hidden_states"] else None
        return ManyheadsSequenceClassifierOutput(
            self._with_router_loss(loss, aux_loss, share), logits, hidden, out.attentions, aux_loss
        )
