"""Models around any mechanism: causal and encoder-decoder language models, sequence and image classifiers.

Pre-norm blocks: x + mixer(norm(x)), in a decoder x + cross mixer(norm(x), encoder), then x + mlp(norm(x)).
Shapes: b batch, n tokens, e hidden size, m tokens of the encoder.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism, Result
from manyheads.models.cache import ManyheadsCache, ManyheadsCacheLayer, Memory
from manyheads.models.configuration import ManyheadsConfig, Spec, layer_pattern, spec_arguments, spec_name
from manyheads.registry import create_attention, mechanism_class
from manyheads.state import State

logger = logging.get_logger(__name__)


@dataclass
class ManyheadsModelOutput(BaseModelOutputWithPast):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSeq2SeqModelOutput(Seq2SeqModelOutput):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsCausalLMOutput(CausalLMOutputWithPast):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSeq2SeqLMOutput(Seq2SeqLMOutput):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsSequenceClassifierOutput(SequenceClassifierOutput):
    aux_loss: Tensor | None = None


@dataclass
class ManyheadsImageClassifierOutput(ImageClassifierOutput):
    aux_loss: Tensor | None = None


# -- building mechanisms -----------------------------------------------------------------------------------------------


def build_mechanism(config: ManyheadsConfig, place: str, spec: Spec, pattern: Pattern) -> Mechanism:
    """The mechanism of one layer. It initialises itself; nothing here touches its parameters afterwards."""
    name, arguments = spec_name(spec), {"causal": pattern.causal, **spec_arguments(spec)}
    heads = arguments.pop("heads", config.num_attention_heads)
    rotates = "rotary" in inspect.signature(mechanism_class(name)).parameters
    if config.positions == "rotary" and rotates and pattern in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF):
        arguments.setdefault("rotary", {"base": config.rotary_base})
    try:
        mechanism = _materialised(name, config.hidden_size, heads, arguments)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if mechanism.sources != 1:
        raise ValueError(f"{place}: {name} reads {mechanism.sources} sources; an encoder-decoder has one")
    for module in mechanism.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    return mechanism


def _materialised(name: str, dim: int, heads: int, arguments: dict[str, Any]) -> Mechanism:
    """Built with values even where Hugging Face builds models without (on the meta device, before loading), as a
    constructor may compute; and in float32 where the default is narrower, as an initialisation may need it."""
    dtype = torch.get_default_dtype()
    empty = torch.empty(0).is_meta
    if not empty and dtype in (torch.float32, torch.float64):
        return create_attention(name, dim, heads, **arguments)
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    try:
        with torch.device("cpu" if empty else torch.get_default_device()):
            mechanism = create_attention(name, dim, heads, **arguments)
    finally:
        torch.set_default_dtype(dtype)
    mechanism.to(dtype)
    mechanism._awaits_weights = empty  # type: ignore[assignment]
    return mechanism


@torch.no_grad()
def _fill_gaps(mechanism: Mechanism) -> None:
    """After loading: what no checkpoint held (non-persistent buffers, missing parameters) was emptied, and gets what a
    new mechanism has."""
    tensors = dict(mechanism.named_parameters()) | dict(mechanism.named_buffers())
    gaps = {name: tensor for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)}
    if gaps:
        fresh = type(mechanism)(**mechanism.config)
        values = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
        for name, tensor in gaps.items():
            tensor.copy_(values[name])


# -- layers ------------------------------------------------------------------------------------------------------------


class ShortConvolution(nn.Module):
    """Depthwise, over the last `width` tokens where causal, else centred; padding counts as zero."""

    def __init__(self, dim: int, width: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.width = causal, width
        self.weight = nn.Parameter(torch.empty(dim, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory | None) -> Tensor:
        """x: [b, n, e] -> the same. real: [b, n], False = padding."""
        n, before = x.shape[1], self.width - 1 if self.causal else (self.width - 1) // 2
        rows = x if real is None else x.masked_fill(~real[..., None], 0.0)
        if memory is not None:
            state = memory.state("convolution", lambda: State("short convolution", x.shape[0]))
            rows = state.append("inputs", rows)[:, -(n + before) :]
            state.advance(n, span=self.width)
        missing = n + before - rows.shape[1]
        rows = F.pad(rows.transpose(1, 2), (missing, self.width - 1 - before))
        return F.conv1d(rows, self.weight, groups=x.shape[2]).transpose(1, 2)


class Mixer(nn.Module):
    """norm -> short convolution -> mechanism."""

    def __init__(self, config: ManyheadsConfig, place: str, spec: Spec, pattern: Pattern) -> None:
        super().__init__()
        self.grid, causal = pattern is Pattern.GRID, pattern.causal
        convolves = config.short_conv and not pattern.cross and not self.grid
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.convolution = ShortConvolution(config.hidden_size, config.short_conv, causal) if convolves else None
        self.mechanism = build_mechanism(config, place, spec, pattern)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Memory | None = None,
        need_weights: bool = False,
    ) -> Result:
        """x: [b, n, e], or [b, height, width, e] for images, which a mechanism that is no grid's sees as a sequence."""
        if x.ndim == 4 and not self.grid:
            result = self(x.flatten(1, 2), context, mask, positions, memory, need_weights)
            return result._replace(output=result.output.view(x.shape))
        state = None
        if memory is not None:
            memory.record(self, x, context, mask, positions)
            state = memory.state("mechanism", lambda: self.mechanism.init_state(x.shape[0]))
        x = self.norm(x)
        if self.convolution is not None:
            x = self.convolution(x, mask if mask is not None and mask.ndim == 2 else None, memory)
        return self.mechanism(x, context, mask=mask, positions=positions, state=state, need_weights=need_weights)


class MLP(nn.Module):
    """norm -> SwiGLU, or two layers with GELU."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        gated = config.hidden_act == "swiglu"
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Masks(NamedTuple):
    """self_mask: [b, n] padding of this pass, or dense [b, 1 or h, n, total]. context_mask: [b, m]. positions: [b, n],
    None where they are as usual."""

    self_mask: Tensor | None = None
    context_mask: Tensor | None = None
    positions: Tensor | None = None


class ManyheadsBlock(GradientCheckpointingLayer):
    """One layer: self mixer, cross mixer in a decoder, MLP."""

    def __init__(self, config: ManyheadsConfig, self_mixer: Mixer, cross_mixer: Mixer | None = None) -> None:
        super().__init__()
        self.self_attn = self_mixer
        self.cross_attn = cross_mixer
        self.mlp = MLP(config) if config.intermediate_size else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        masks: Masks | None = None,
        past_key_values: ManyheadsCacheLayer | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states, self and cross weights where asked for, and the sum of auxiliary losses, None without any."""
        masks, layer = masks or Masks(), past_key_values
        memory, cross_memory = (None, None) if layer is None else layer.memories
        mixed = self.self_attn(x, None, masks.self_mask, masks.positions, memory, need_weights)
        x = x + self.dropout(mixed.output)
        losses, cross_weights = list(mixed.losses.values()), None
        if self.cross_attn is not None:
            crossed = self.cross_attn(x, context, masks.context_mask, masks.positions, cross_memory, need_weights)
            x = x + self.dropout(crossed.output)
            losses, cross_weights = losses + list(crossed.losses.values()), crossed.weights
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(x))
        return x, mixed.weights, cross_weights, torch.stack(losses).sum() if losses else None


class Trace(NamedTuple):
    """What a stack gives: the last hidden states, and per layer what was asked for."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    cross_attentions: tuple[Tensor | None, ...] | None
    aux_loss: Tensor | None


class Stack(nn.Module):
    """Blocks and a last norm, with positions of a sequence."""

    def __init__(self, config: ManyheadsConfig, blocks: list[ManyheadsBlock], places: int | None = None) -> None:
        super().__init__()
        learned = config.positions == "learned"
        self.places = config.max_position_embeddings if places is None else places
        self.embed_positions = nn.Embedding(self.places, config.hidden_size) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        masks: Masks | None = None,
        past_key_values: ManyheadsCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Trace:
        masks = masks or Masks()
        x = self.dropout(self._positioned(x, masks.positions, past_key_values))
        hidden, weights, cross_weights, losses = [x], [], [], []
        for i, block in enumerate(self.layers):
            layer = None if past_key_values is None else past_key_values.layers[i]
            x, weight, cross_weight, loss = block(
                x, context, masks, past_key_values=layer, need_weights=output_attentions
            )
            hidden.append(x)
            weights.append(weight)
            cross_weights.append(cross_weight)
            losses += [] if loss is None else [loss]
        x = self.norm(x)
        return Trace(
            x,
            (*hidden[:-1], x) if output_hidden_states else None,
            tuple(weights) if output_attentions else None,
            tuple(cross_weights) if output_attentions and context is not None else None,
            torch.stack(losses).sum() if losses else None,
        )

    def _positioned(self, x: Tensor, positions: Tensor | None, cache: ManyheadsCache | None) -> Tensor:
        if self.embed_positions is None:
            return x
        if x.ndim == 4:
            return x + self.embed_positions.weight.view(*x.shape[1:3], -1)
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            if seen + x.shape[1] > self.places:
                raise ValueError(
                    f"{seen + x.shape[1]} tokens, but max_position_embeddings={self.places} positions were learned; "
                    "shorten the input, or build the model with more"
                )
            positions = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        return x + self.embed_positions(positions)

    @property
    def can_cache(self) -> bool:
        return self.obstacle is None

    @property
    def obstacle(self) -> str | None:
        """The first mechanism that cannot decode step by step, None where all can."""
        for i, block in enumerate(self.layers):
            mixers: list[Any] = [block.self_attn, block.cross_attn]
            for mechanism in (mixer.mechanism for mixer in mixers if mixer is not None):
                if not (mechanism.card.decodes and mechanism.causal):
                    return f"layer {i}, {mechanism.card.name}"
        return None


def build_stack(config: ManyheadsConfig, causal: bool | None, *, images: bool = False) -> Stack:
    """Self mixers only. causal None: whatever each mechanism declares, noncausal first."""
    blocks = []
    for i, spec in enumerate(config.encoder_specs()):
        place = f"layers[{i}]"
        pattern = layer_pattern(place, spec, causal, grid=images)
        blocks.append(ManyheadsBlock(config, Mixer(config, place, spec, pattern)))
    height, width = config.image_shape
    return Stack(config, blocks, height // config.patch_size * (width // config.patch_size) if images else None)


def build_decoder(config: ManyheadsConfig) -> Stack:
    """Self and cross mixers."""
    cross = Pattern.CAUSAL_CROSS if config.decoder_causal else Pattern.NONCAUSAL_CROSS
    blocks = []
    for i, (own, other) in enumerate(zip(config.decoder_specs(), config.cross_specs(), strict=True)):
        places = f"decoder_layers[{i}]", f"cross_layers[{i}]"
        pattern = layer_pattern(places[0], own, config.decoder_causal)
        mixers = Mixer(config, places[0], own, pattern), Mixer(config, places[1], other, cross)
        blocks.append(ManyheadsBlock(config, *mixers))
    return Stack(config, blocks)


# -- masks and positions -----------------------------------------------------------------------------------------------


def read_masks(attention_mask: Tensor | None, position_ids: Tensor | None, x: Tensor, seen: int) -> Masks:
    """From Hugging Face's attention mask [b, seen + n], 1 = real, and position ids [b or 1, n].

    Only what says something is kept: neither a mask of ones nor positions that count up as usual. Positions that are
    not given follow the mask, so that left padding does not shift them.
    """
    n, total = x.shape[1], seen + x.shape[1]
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"a 4-D attention_mask must be boolean, True = may attend; got {attention_mask.dtype}")
        return Masks(attention_mask, positions=position_ids)
    real, usual = None, torch.arange(seen, total, device=x.device)[None]
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (x.shape[0], total):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; want {[x.shape[0], total]}, one entry for "
                f"each of the {seen} tokens in the cache and the {n} new ones"
            )
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
        real = attention_mask[:, -n:].bool()
    if torch.compiler.is_compiling():
        return Masks(real, positions=position_ids)
    if position_ids is not None:
        same = position_ids == usual
        if bool((same if real is None else same | ~real).all()):
            position_ids = None
    return Masks(None if real is None or bool(real.all()) else real, positions=position_ids)


def _real(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()


# -- models ------------------------------------------------------------------------------------------------------------


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
        elif isinstance(module, nn.Linear | nn.RMSNorm | ShortConvolution):
            module.reset_parameters()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Mechanism) and getattr(module, "_awaits_weights", False):
                _fill_gaps(module)
                module._awaits_weights = False  # type: ignore[assignment]
        super().initialize_weights()

    @property
    def decoder_stack(self) -> Stack:
        """The blocks that decode."""
        base = self.base_model
        return base.decoder if isinstance(base, ManyheadsSeq2SeqModel) else base.stack

    def _cache(self, past: Any, use_cache: bool | None) -> ManyheadsCache | None:
        """The cache to use, a new one where one is wanted, or None."""
        stack = self.decoder_stack
        if use_cache is None:
            use_cache = past is not None or (self.config.use_cache and not self.training and stack.can_cache)
        if not use_cache:
            return None
        if stack.obstacle:
            raise ValueError(f"{stack.obstacle}, cannot decode step by step; call the model with use_cache=False")
        if past is None:
            return ManyheadsCache(len(stack.layers))
        if not isinstance(past, ManyheadsCache) or len(past.layers) != len(stack.layers):
            raise ValueError(
                f"past_key_values is {type(past).__name__} of {len(past)} layers; want a "
                f"ManyheadsCache({len(stack.layers)}), or None for a new one"
            )
        return past

    def _wants(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        """What was asked for in the call, else in the configuration."""
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return {"output_attentions": bool(attentions), "output_hidden_states": bool(hidden)}

    def _with_router_loss(self, loss: Tensor | None, aux_loss: Tensor | None, share: Any = 1.0) -> Tensor | None:
        if loss is None or aux_loss is None:
            return loss
        return loss + self.config.router_loss_weight * share * aux_loss.to(loss.device)


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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = build_stack(config, causal if config.is_causal is None else config.is_causal)
        self.post_init()

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
    ) -> ManyheadsModelOutput:
        x = _embedded(self.embed_tokens, input_ids, inputs_embeds, "input_ids, inputs_embeds")
        cache = self._cache(past_key_values, use_cache) if self.decodes else None
        masks = read_masks(attention_mask, position_ids, x, 0 if cache is None else cache.get_seq_length())
        wants = self._wants(output_attentions, output_hidden_states)
        trace = self.stack(x, None, masks, past_key_values=cache, **wants)
        return ManyheadsModelOutput(trace.last, cache, trace.hidden_states, trace.attentions, trace.aux_loss)


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
        cache = self._cache(past_key_values, use_cache)
        seen = 0 if cache is None else cache.get_seq_length()
        masks = read_masks(decoder_attention_mask, decoder_position_ids, x, seen)
        masks = masks._replace(context_mask=_real(attention_mask))
        trace = self.decoder(x, encoder_outputs.last_hidden_state, masks, past_key_values=cache, **wants)
        losses = [loss for loss in (encoder_outputs.get("aux_loss"), trace.aux_loss) if loss is not None]
        return ManyheadsSeq2SeqModelOutput(
            last_hidden_state=trace.last,
            past_key_values=cache,
            decoder_hidden_states=trace.hidden_states,
            decoder_attentions=trace.attentions,
            cross_attentions=trace.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            aux_loss=torch.stack(losses).sum() if losses else None,
        )


class ManyheadsGenerationMixin(GenerationMixin):
    """`generate` with mechanisms' states for a cache. A model with a mechanism that cannot decode step by step runs
    without one, recomputing every step."""

    accepts_loss_kwargs = True

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: the layers decide what is kept; "
                "leave it out"
            )
        stack = self.decoder_stack
        if stack.obstacle and generation_config.use_cache is not False:
            logger.warning_once(f"{stack.obstacle}, cannot decode step by step: generating without a cache")
            generation_config.use_cache = False
        if generation_config.use_cache is False:
            return
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = model_kwargs["past_key_values"] = ManyheadsCache(len(stack.layers))
        else:
            cache._is_user_defined = True
        if generation_config.is_assistant:
            cache.activate_past_recording()


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> tuple[Tensor, Any]:
    """Mean cross entropy over labels other than -100, and these labels' share of all that one optimizer step sees.

    num_items_in_batch: how many those are, where several batches make a step."""
    labels, wide = labels.to(logits.device), logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    count = (labels != -100).sum()
    if num_items_in_batch is None:
        return loss / count.clamp(min=1), 1.0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch, count / num_items_in_batch


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
    ) -> ManyheadsCausalLMOutput:
        """labels: [b, n] as input_ids (they are shifted here), -100 = not predicted."""
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss, share = None, 1.0
        if labels is not None:
            loss, share = token_loss(logits[:, :-1], labels[:, 1:], num_items_in_batch)
        return ManyheadsCausalLMOutput(
            self._with_router_loss(loss, out.aux_loss, share),
            logits,
            out.past_key_values,
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

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels one place to the right, after the start token."""
        config = self.config
        start = next((t for t in (config.decoder_start_token_id, config.bos_token_id) if t is not None), None)
        if start is None:
            raise ValueError("decoder inputs are made of labels only with decoder_start_token_id or bos_token_id set")
        filled = labels.masked_fill(labels == -100, start if config.pad_token_id is None else config.pad_token_id)
        return F.pad(filled[:, :-1], (1, 0), value=start)

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
        logits, loss, share = self.lm_head(out.last_hidden_state), None, 1.0
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

    def forward(self, x: Tensor, real: Tensor | None) -> Result:
        if self.mechanism is not None:
            return self.mechanism(x, mask=real)
        if real is None:
            return Result(x.mean(1))
        return Result(x.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True).clamp(min=1).to(x.dtype))


def _sum_losses(trace_loss: Tensor | None, pooled: Result) -> Tensor | None:
    losses = [*([] if trace_loss is None else [trace_loss]), *pooled.losses.values()]
    return torch.stack(losses).sum() if losses else None


class ManyheadsForSequenceClassification(ManyheadsPreTrainedModel):
    """Labels for whole sequences. Layers are noncausal where their mechanism is, unless is_causal says otherwise."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.model = ManyheadsModel(config, causal=None, decodes=False)
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
    ) -> ManyheadsSequenceClassifierOutput:
        """labels: [b] classes, or [b, num_labels] targets (config.problem_type, as in transformers)."""
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = self.pooling(out.last_hidden_state, _real(attention_mask))
        logits, aux_loss = self.classifier(pooled.output), _sum_losses(out.aux_loss, pooled)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ManyheadsSequenceClassifierOutput(
            self._with_router_loss(loss, aux_loss), logits, out.hidden_states, out.attentions, aux_loss
        )


class ManyheadsForImageClassification(ManyheadsPreTrainedModel):
    """Labels for images, cut into patches that stand in a grid: a mechanism for grids sees it, others the sequence of
    its rows. is_causal as in ManyheadsForSequenceClassification."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.embed_patches = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.stack = build_stack(config, config.is_causal, images=True)
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
    ) -> ManyheadsImageClassifierOutput:
        """pixel_values: [b, channels, height, width]. labels: as in ManyheadsForSequenceClassification."""
        wants = self._wants(output_attentions, output_hidden_states)
        trace = self.stack(self.embed_patches(self._patches(pixel_values)), **wants)
        pooled = self.pooling(trace.last.flatten(1, 2), None)
        logits, aux_loss = self.classifier(pooled.output), _sum_losses(trace.aux_loss, pooled)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        hidden = trace.hidden_states and tuple(x.flatten(1, 2) for x in trace.hidden_states)
        return ManyheadsImageClassifierOutput(
            self._with_router_loss(loss, aux_loss), logits, hidden, trace.attentions, aux_loss
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
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).to(self.embed_patches.weight.dtype)
