"""What models are stacked of: mechanisms built from a configuration, and blocks around them.

x + mixer(norm(x)), in a decoder x + cross mixer(norm(x), encoder), then x + mlp(norm(x)); norms before, after, or
around what is added, as the configuration says.
Shapes: b batch, n tokens, e hidden size, m tokens of the encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from manyheads.card import Pattern
from manyheads.inner import Across
from manyheads.mechanism import Mechanism, Result
from manyheads.models.beside import NOTHING, Beside, without_place
from manyheads.models.cache import ManyheadsCacheLayer, Memory
from manyheads.models.configuration import ManyheadsConfig, Spec, spec_arguments, spec_name
from manyheads.models.feed_forward import Adapter, feed_forward, layer_scale, sublayer_norms
from manyheads.models.masks import Masks
from manyheads.registry import create_attention, mechanism_class
from manyheads.state import State

# -- building mechanisms -----------------------------------------------------------------------------------------------


def build_mechanism(
    config: ManyheadsConfig, place: str, spec: Spec, pattern: Pattern, also: Sequence[str] = ()
) -> Mechanism:
    """The mechanism of one layer. It initialises itself; nothing here touches its parameters afterwards. also: what it
    is given by name at this place alone."""
    name, arguments = spec_name(spec), {"causal": pattern.causal, **spec_arguments(spec)}
    if missing := without_place(mechanism_class(name).card, pattern, also):
        raise ValueError(f"{place}: {missing}")
    heads = arguments.pop("heads", config.num_attention_heads)
    rotates = "rotary" in inspect.signature(mechanism_class(name)).parameters
    if config.positions == "rotary" and rotates and pattern in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF):
        arguments.setdefault("rotary", {"base": config.rotary_base})
    return housed_mechanism(place, name, config.hidden_size, heads, arguments)


def housed_mechanism(place: str, name: str, dim: int, heads: int, arguments: dict[str, Any]) -> Mechanism:
    """A mechanism as part of a Hugging Face model, which leaves its parameters alone. place: named in errors."""
    try:
        mechanism = _materialised(name, dim, heads, arguments)
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
def fill_gaps(mechanism: Mechanism) -> None:
    """After loading: what no checkpoint held (non-persistent buffers, missing parameters) was emptied, and gets what a
    new mechanism has."""
    tensors = dict(mechanism.named_parameters()) | dict(mechanism.named_buffers())
    gaps = {name: tensor for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)}
    if gaps:
        fresh = type(mechanism)(**mechanism.config)
        values = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
        # What a quantiser put into a layer has no counterpart, and is that quantiser's to fill.
        for name in gaps.keys() & values.keys():
            gaps[name].copy_(values[name])


# -- layers ------------------------------------------------------------------------------------------------------------


class ShortConvolution(nn.Module):
    """Depthwise, over the last `width` tokens where causal, else centred; padding counts as zero."""

    spread_over: Across | None = None  # as in a mechanism

    def __init__(self, dim: int, width: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.width = causal, width
        self.weight = nn.Parameter(torch.empty(dim, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory | None) -> Tensor:
        """x: [b, n, e] -> the same. real: [b, n], False = padding."""
        n, before, rows = x.shape[1], self.width - 1 if self.causal else (self.width - 1) // 2, x
        if memory is not None:
            state, new = memory.state("convolution", lambda: State("short convolution", x.shape[0])), real
            seen = state.length
            usual = torch.ones(1, seen + n, dtype=torch.bool, device=x.device)
            rows, real = state.append("inputs", x), state.append_optional("padding", real, usual)
            rows, real = rows[:, -(n + before) :], None if real is None else real[:, -(n + before) :]
            state.advance(n, span=self.width)
            state.note(new, seen)
        rows = rows if real is None else rows.masked_fill(~real[..., None], 0.0)
        if self.spread_over is not None:
            rows = torch.cat((self.spread_over.before(rows, before), rows), 1)
        missing = n + before - rows.shape[1]
        rows = F.pad(rows.transpose(1, 2), (missing, self.width - 1 - before))
        return F.conv1d(rows, self.weight, groups=x.shape[2]).transpose(1, 2)


class ScaledEmbedding(nn.Embedding):
    """Rows times a scale, rounded to their dtype as Gemma does."""

    def __init__(self, count: int, dim: int, *, scale: float, padding_idx: int | None = None) -> None:
        super().__init__(count, dim, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)


class Mixer(nn.Module):
    """norm -> adapter -> short convolution -> mechanism -> norm, of which all but the mechanism may be missing."""

    def __init__(
        self, config: ManyheadsConfig, place: str, spec: Spec, pattern: Pattern, also: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.grid, causal = config.patch_grid if pattern is Pattern.GRID else None, pattern.causal
        self.graph = pattern is Pattern.GRAPH
        convolves = config.short_conv and not pattern.cross and self.grid is None
        self.norm, self.norm_after = sublayer_norms(config)
        self.adapter = Adapter(config) if config.adapter_size else None
        self.convolution = ShortConvolution(config.hidden_size, config.short_conv, causal) if convolves else None
        self.mechanism = build_mechanism(config, place, spec, pattern, also)
        self.takes = {*self.mechanism.card.takes, *(["edges"] if self.graph else [])}

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Memory | None = None,
        need_weights: bool = False,
        inputs: Beside = NOTHING,
    ) -> Result:
        """x: [b, n, e], of images row by row, which a mechanism for grids sees as [b, rows, columns, e]. inputs: what
        the mechanism takes by name."""
        state = None
        if memory is not None:
            memory.record(self, x, context, mask, positions, inputs)
            state = memory.state("mechanism", lambda: self.mechanism.init_state(x.shape[0]))
        x = self.norm(x)
        if self.adapter is not None:
            x = x + self.adapter(x)
        if self.grid is not None:
            result = self.mechanism(x.unflatten(1, self.grid), need_weights=need_weights)
            return result._replace(output=self.norm_after(result.output.flatten(1, 2)))
        if self.graph:
            result = _as_one_graph(self.mechanism, x, mask, need_weights, inputs)
            return result._replace(output=self.norm_after(result.output))
        if self.convolution is not None:
            x = self.convolution(x, mask if mask is not None and mask.ndim == 2 else None, memory)
        result = self.mechanism(
            x, context, mask=mask, positions=positions, state=state, need_weights=need_weights, **inputs
        )
        return result._replace(output=self.norm_after(result.output))


def _as_one_graph(mechanism: Mechanism, x: Tensor, mask: Tensor | None, need_weights: bool, inputs: Beside) -> Result:
    """x [b, n, e] of b graphs, of which no edge leads from one to another; of the weights what is within each."""
    b, n = x.shape[:2]
    real = None if mask is None else mask.flatten()[None]
    result = mechanism(x.flatten(0, 1)[None], mask=real, need_weights=need_weights, **inputs)
    weights = result.weights
    if weights is not None:
        weights = weights[0].unflatten(2, (b, n)).unflatten(1, (b, n)).diagonal(dim1=1, dim2=3).movedim(-1, 0)
    return result._replace(output=result.output[0].unflatten(0, (b, n)), weights=weights)


class ManyheadsBlock(GradientCheckpointingLayer):
    """One layer: self mixer, cross mixer in a decoder, MLP."""

    def __init__(self, config: ManyheadsConfig, self_mixer: Mixer, cross_mixer: Mixer | None = None) -> None:
        super().__init__()
        self.self_attn = self_mixer
        self.cross_attn = cross_mixer
        self.mlp = feed_forward(config)
        self.mlp_by_kind = bool({"mlp", "adapter"} & set(config.by_kind))
        self.self_scale = layer_scale(config)
        self.cross_scale = nn.Identity() if cross_mixer is None else layer_scale(config)
        self.mlp_scale = nn.Identity() if self.mlp is None else layer_scale(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        masks: Masks | None = None,
        earlier: Tensor | None = None,
        weights_below: Tensor | None = None,
        past_key_values: ManyheadsCacheLayer | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states, self and cross weights where asked for, and the sum of auxiliary losses, None without any.
        earlier, weights_below: of layers below, by position, as a checkpointed layer may else lose their gradient."""
        masks, layer = masks or Masks(), past_key_values
        memory, cross_memory = (None, None) if layer is None else layer.memories
        inputs = {name: value for name, value in masks.beside.items() if name in self.self_attn.takes}
        below = {"earlier": earlier, "weights_below": weights_below}
        inputs |= {name: value for name, value in below.items() if value is not None}
        mixed = self.self_attn(x, None, masks.self_mask, masks.positions, memory, need_weights, inputs)
        x = x + self.self_scale(self.dropout(mixed.output))
        losses, cross_weights = list(mixed.losses.values()), None
        if self.cross_attn is not None:
            crossed = self.cross_attn(x, context, masks.context_mask, masks.positions, cross_memory, need_weights)
            x = x + self.cross_scale(self.dropout(crossed.output))
            losses, cross_weights = losses + list(crossed.losses.values()), crossed.weights
        if self.mlp is not None:
            losses += self.mlp.losses(x, masks.self_mask)
            added = self.mlp(x, masks.beside["token_kinds"]) if self.mlp_by_kind else self.mlp(x)
            x = x + self.mlp_scale(self.dropout(added))
        return x, mixed.weights, cross_weights, torch.stack(losses).sum() if losses else None
