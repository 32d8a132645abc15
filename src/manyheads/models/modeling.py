"""The bodies of models around any mechanism: an encoder or decoder alone, and the two together.

Shapes: b batch, n tokens, e hidden size, m tokens of the encoder.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, Seq2SeqModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from manyheads.cache_names import CACHE_NAME, takes_cache
from manyheads.mechanism import Mechanism
from manyheads.models.beside import read_beside
from manyheads.models.borrowed import BorrowedCache, obstacle, refused, shape_of_rows
from manyheads.models.cache import ManyheadsCache
from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.feed_forward import Scale
from manyheads.models.layers import ScaledEmbedding, ShortConvolution, fill_gaps
from manyheads.models.masks import read_masks, real_tokens
from manyheads.models.packed import Packing, find_documents
from manyheads.models.stack import Stack, build_decoder, build_stack

logger = logging.get_logger(__name__)


@dataclass
class ManyheadsModelOutput(BaseModelOutputWithPast):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSeq2SeqModelOutput(Seq2SeqModelOutput):
    aux_loss: Tensor | None = None


class ManyheadsPreTrainedModel(PreTrainedModel):
    config_class = ManyheadsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ManyheadsBlock",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings are normal; all else keeps PyTorch's own initialisation. Mechanisms never come here."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Linear | nn.RMSNorm | ShortConvolution | Scale):
            module.reset_parameters()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: the configuration that is saved with it says how it is opened."""

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Mechanism) and getattr(module, "_awaits_weights", False):
                fill_gaps(module)
                module._awaits_weights = False  # type: ignore[assignment]
        super().initialize_weights()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer is to say how many labels a step has, over which the loss is then the mean."""
        return "num_items_in_batch" in inspect.signature(self.forward).parameters

    @property
    def reads(self) -> set[str]:
        """What it reads of a call beside its tokens, by name."""
        stacks = [module for module in self.modules() if isinstance(module, Stack)]
        return {name for stack in stacks for reader in stack.readers for name in reader.takes}

    @property
    def decoder_stack(self) -> Stack:
        """The blocks that decode."""
        base = self.base_model
        return base.decoder if isinstance(base, ManyheadsSeq2SeqModel) else base.stack

    def _cache(self, past: Any, use_cache: bool | None, x: Tensor) -> ManyheadsCache | None:
        """The cache to use for x [b, n, e], a new one where one is wanted, or None. One that is given is read and
        filled whatever use_cache says, as in transformers, where it says what is given back."""
        stack = self.decoder_stack
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and stack.can_cache
        if past is None and not use_cache:
            return None
        if stack.obstacle:
            raise ValueError(f"{stack.obstacle}, cannot decode step by step; call the model with use_cache=False")
        if stack.forgets and (past is None or isinstance(past, Cache)):
            _forget(past)
            return None
        if past is None:
            return ManyheadsCache(stack.memories)
        if isinstance(past, ManyheadsCache) and len(past.layers) == stack.memories:
            return past
        lent: ManyheadsCache | None = past.lend(stack, len(x)) if hasattr(past, "lend") else None
        if lent is not None:
            return lent
        why = obstacle(past, stack)
        if why:
            raise refused(past, stack, why)
        return BorrowedCache(past, stack, x)

    def _wants(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        """What was asked for in the call, else in the configuration."""
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return {"output_attentions": bool(attentions), "output_hidden_states": bool(hidden)}

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _label_loss(self, labels: Tensor | None, logits: Tensor, items: Any) -> tuple[Tensor | None, Any]:
        """Of a classifier: transformers' own, and the batch's share of what one optimizer step sees."""
        if labels is None:
            return None, 1.0
        given = {} if items is None else {"num_items_in_batch": items}
        loss = self.loss_function(labels, logits, self.config, **given)
        if items is None:
            return loss, 1.0
        share = (labels != -100).sum().to(loss.device) / items
        return loss if self.config.problem_type == "single_label_classification" else loss * share, share

    def _with_router_loss(self, loss: Tensor | None, aux_loss: Tensor | None, share: Any = 1.0) -> Tensor | None:
        if loss is None or aux_loss is None:
            return loss
        return loss + self.config.router_loss_weight * share * aux_loss.to(loss.device)


def _forget(past: Cache | None) -> None:
    """transformers takes the cache from layers that are passed twice. ValueError where it has seen tokens."""
    seen = 0 if past is None else past.get_seq_length()
    if seen:
        raise ValueError(
            f"past_key_values has seen {seen} tokens, and checkpointed layers read no states in training; call eval() "
            "or gradient_checkpointing_disable(), or leave past_key_values out"
        )
    logger.warning_once("checkpointed layers keep no states in training: no past_key_values are given back")


def _embedded(embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, names: str) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"give exactly one of {names}")
    return embedding(input_ids) if inputs_embeds is None else inputs_embeds


class ManyheadsModel(ManyheadsPreTrainedModel):
    """Embeddings and a stack of self mixers: the body of causal language models, classifiers and encoders.

    causal, where the configuration leaves it open: True, or None for noncausal layers wherever a mechanism has them.
    """

    def __init__(self, config: ManyheadsConfig, *, causal: bool | None = True, decodes: bool = True) -> None:
        super().__init__(config)
        if decodes and config.is_encoder_decoder:
            raise ValueError("the configuration is an encoder-decoder's; use ManyheadsSeq2SeqModel or ...ForSeq2SeqLM")
        self.decodes = decodes
        padding = config.pad_token_id  # untrained, as in transformers; a configuration may name one that is no row
        self.embed_tokens: nn.Embedding = ScaledEmbedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.embedding_scale,
            padding_idx=padding if padding is not None and 0 <= padding < config.vocab_size else None,
        )
        self.stack = build_stack(config, causal if config.is_causal is None else config.is_causal)
        config.tell_rows(shape_of_rows(self.stack))
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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Any = None,
        cache_position: Any = None,
        token_kinds: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> ManyheadsModelOutput:
        """attention_mask: [b, seen + n], 1 = real, or [b, 1 or heads, n, seen + n] boolean. Without one, positions that
        do not count up by one begin another document, which sees nothing of those before; seq_idx, cu_seq_lens_* and
        max_length_* say the same. token_type_ids and cache_position say nothing here, as to transformers' decoders.
        token_kinds: [b, n] integers, what kind each token of this pass is of; boxes: [b, n, 4], where it stands on its
        page; to be given where a layer's card takes them, and nowhere else."""
        x = _embedded(self.embed_tokens, input_ids, inputs_embeds, "input_ids, inputs_embeds")
        beside = read_beside(x, token_kinds=token_kinds, boxes=boxes)
        packing = Packing(seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        documents = find_documents(position_ids, attention_mask, x, packing)
        if documents is not None:
            documents.refuse_cache(past_key_values, use_cache)
            trace = documents.through(self.stack, x, beside, **self._wants(output_attentions, output_hidden_states))
            return ManyheadsModelOutput(trace.last, None, trace.hidden_states, trace.attentions, trace.aux_loss)
        cache = self._cache(past_key_values, use_cache, x) if self.decodes else None
        masks = read_masks(attention_mask, position_ids, x, cache)._replace(beside=beside)
        wants = self._wants(output_attentions, output_hidden_states)
        trace = self.stack(x, None, masks, past_key_values=cache, **wants)
        past = None if cache is None else cache.after(x.shape[1])
        past = None if use_cache is False else past
        return ManyheadsModelOutput(trace.last, past, trace.hidden_states, trace.attentions, trace.aux_loss)


class ManyheadsSeq2SeqModel(ManyheadsPreTrainedModel):
    """An encoder, and a decoder that reads it; both embed tokens alike."""

    _input_embed_layer = "embed_tokens"

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError("an encoder-decoder needs a configuration with is_encoder_decoder=True")
        self.encoder = ManyheadsModel(config, causal=None, decodes=False)
        self.decoder = build_decoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        token_type_ids: Any = None,
        cache_position: Any = None,
    ) -> ManyheadsSeq2SeqModelOutput:
        wants = self._wants(output_attentions, output_hidden_states)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **wants
            )
        elif not isinstance(encoder_outputs, dict):
            encoder_outputs = ManyheadsModelOutput(last_hidden_state=encoder_outputs[0])
        names = "decoder_input_ids, decoder_inputs_embeds"
        x = _embedded(self.encoder.embed_tokens, decoder_input_ids, decoder_inputs_embeds, names)
        cache = self._cache(past_key_values, use_cache, x)
        if find_documents(decoder_position_ids, decoder_attention_mask, x, Packing()):
            raise ValueError(
                "decoder_position_ids do not count up by one: several documents in a row, of which each would read the "
                "encoder's whole input; give each document a row of its own"
            )
        masks = read_masks(decoder_attention_mask, decoder_position_ids, x, cache)
        masks = masks._replace(context_mask=real_tokens(attention_mask))
        trace = self.decoder(x, encoder_outputs.last_hidden_state, masks, past_key_values=cache, **wants)
        losses = [loss for loss in (encoder_outputs.get("aux_loss"), trace.aux_loss) if loss is not None]
        return ManyheadsSeq2SeqModelOutput(
            last_hidden_state=trace.last,
            **{CACHE_NAME: None if use_cache is False else cache},
            decoder_hidden_states=trace.hidden_states,
            decoder_attentions=trace.attentions,
            cross_attentions=trace.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            aux_loss=torch.stack(losses).sum() if losses else None,
        )
