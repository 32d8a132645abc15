"""What models are stacked of: mechanisms built from a configuration, and blocks around them.

x + mixer(norm(x)), in a decoder x + cross mixer(norm(x), encoder), then x + mlp(norm(x)); norms before, after, or
around what is added, as the configuration says.
Shapes: b batch, n tokens, e hidden size, m tokens of the encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from manyheads.card import Pattern
from manyheads.functional.layers import rms_norm
from manyheads.functional.routing import balance_loss, top_k_mask
from manyheads.inner import Across
from manyheads.mechanism import Mechanism, Result
from manyheads.models.beside import NOTHING, Beside, below, check_beside, without_place
from manyheads.models.cache import ManyheadsCache, ManyheadsCacheLayer, Memory
from manyheads.models.configuration import ManyheadsConfig, Spec, layer_pattern, spec_arguments, spec_name
from manyheads.models.masks import Masks
from manyheads.registry import create_attention, mechanism_class
from manyheads.state import State

# -- building mechanisms -----------------------------------------------------------------------------------------------


def build_mechanism(config: ManyheadsConfig, place: str, spec: Spec, pattern: Pattern) -> Mechanism:
    """The mechanism of one layer. It initialises itself; nothing here touches its parameters afterwards."""
    name, arguments = spec_name(spec), {"causal": pattern.causal, **spec_arguments(spec)}
    if missing := without_place(mechanism_class(name).card, pattern):
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


def sublayer_norms(config: ManyheadsConfig) -> tuple[nn.Module, nn.Module]:
    """Of a sublayer, before and after it; one that is not there gives back what it gets."""
    here = {"before": (True, False), "after": (False, True), "around": (True, True)}[config.norm_placement]
    before, after = (_norm(config) if wanted else nn.Identity() for wanted in here)
    return before, after


def _norm(config: ManyheadsConfig) -> nn.RMSNorm:
    return rms_norm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


class ScaledEmbedding(nn.Embedding):
    """Rows times a scale, rounded to their dtype as Gemma does."""

    def __init__(self, count: int, dim: int, *, scale: float) -> None:
        super().__init__(count, dim)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)


class Mixer(nn.Module):
    """norm -> short convolution -> mechanism -> norm, of which one norm may be missing."""

    def __init__(self, config: ManyheadsConfig, place: str, spec: Spec, pattern: Pattern) -> None:
        super().__init__()
        self.grid, causal = config.patch_grid if pattern is Pattern.GRID else None, pattern.causal
        self.graph = pattern is Pattern.GRAPH
        convolves = config.short_conv and not pattern.cross and self.grid is None
        self.norm, self.norm_after = sublayer_norms(config)
        self.convolution = ShortConvolution(config.hidden_size, config.short_conv, causal) if convolves else None
        self.mechanism = build_mechanism(config, place, spec, pattern)
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


GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """norm -> gated by SiLU or GELU, or two layers with GELU. normed: False where what is around it norms."""

    def __init__(self, config: ManyheadsConfig, *, normed: bool = True) -> None:
        super().__init__()
        self.gate = GATES.get(config.hidden_act)
        self.norm, self.norm_after = sublayer_norms(config) if normed else (nn.Identity(), nn.Identity())
        dim, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(dim, inner, bias=bias) if self.gate else None
        self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.down_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.gate is None or self.gate_proj is None:
            return self.norm_after(self.down_proj(F.gelu(self.up_proj(x))))
        return self.norm_after(self.down_proj(self.gate(self.gate_proj(x)) * self.up_proj(x)))

    def losses(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        return []


class ExpertMLP(nn.Module):
    """norm -> the best k of several MLPs, whose shares, a softmax over the chosen ones' scores, sum to one."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        self.active = config.num_experts_per_tok
        self.norm, self.norm_after = sublayer_norms(config)
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config, normed=False) for _ in range(config.num_local_experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        best, chosen = self._scores(x).flatten(0, -2).topk(self.active, -1)
        shares, rows = best.softmax(-1).to(x.dtype), x.flatten(0, -2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(rows[row]) * shares[row, place, None])
        return self.norm_after(out.view_as(x))

    def losses(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """See `balance_loss`: k where all experts get as many of the real tokens. mask: [b, n], or a dense one, which
        does not say what is real."""
        probs = self._scores(self.norm(x)).softmax(-1)
        real = mask if mask is not None and mask.ndim == 2 else None
        return [balance_loss(probs, top_k_mask(probs, self.active), real)]

    def _scores(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class ManyheadsBlock(GradientCheckpointingLayer):
    """One layer: self mixer, cross mixer in a decoder, MLP."""

    def __init__(self, config: ManyheadsConfig, self_mixer: Mixer, cross_mixer: Mixer | None = None) -> None:
        super().__init__()
        self.self_attn = self_mixer
        self.cross_attn = cross_mixer
        mlp = ExpertMLP if config.num_local_experts > 1 else MLP
        self.mlp = mlp(config) if config.intermediate_size else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        masks: Masks | None = None,
        earlier: Tensor | None = None,
        past_key_values: ManyheadsCacheLayer | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states, self and cross weights where asked for, and the sum of auxiliary losses, None without any.
        earlier: outputs of layers below, by position, as a checkpointed layer may else lose their gradient."""
        masks, layer = masks or Masks(), past_key_values
        memory, cross_memory = (None, None) if layer is None else layer.memories
        inputs = {name: value for name, value in masks.beside.items() if name in self.self_attn.takes}
        inputs |= {} if earlier is None else {"earlier": earlier}
        mixed = self.self_attn(x, None, masks.self_mask, masks.positions, memory, need_weights, inputs)
        x = x + self.dropout(mixed.output)
        losses, cross_weights = list(mixed.losses.values()), None
        if self.cross_attn is not None:
            crossed = self.cross_attn(x, context, masks.context_mask, masks.positions, cross_memory, need_weights)
            x = x + self.dropout(crossed.output)
            losses, cross_weights = losses + list(crossed.losses.values()), crossed.weights
        if self.mlp is not None:
            losses += self.mlp.losses(x, masks.self_mask)
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
        self.norm = _norm(config)

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
        blocks: Any = self.layers
        check_beside(masks.beside, [block.self_attn.mechanism.card for block in blocks])
        x = self.dropout(self._positioned(x, masks.positions, past_key_values))
        hidden, weights, cross_weights, losses = [x], [], [], []
        for i, block in enumerate(blocks):
            layer = None if past_key_values is None else past_key_values.layers[i]
            earlier = below(i, block.self_attn.mechanism.card, hidden[1:])
            x, weight, cross_weight, loss = block(
                x, context, masks, earlier, past_key_values=layer, need_weights=output_attentions
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

    @torch.no_grad()
    def weights_obstacle(self) -> str | None:
        """The first mechanism that gives no weights once it has a state, found by asking each for two tokens'; None
        where all do."""
        for i, block in enumerate(self.layers):
            mixers: list[Any] = [block.self_attn, block.cross_attn]
            for mixer in (mixer for mixer in mixers if mixer is not None):
                token = self.norm.weight.new_zeros(1, 1, self.norm.weight.shape[0])
                context = token if mixer is block.cross_attn else None
                state, inputs = mixer.mechanism.init_state(1), mixer.mechanism.example_inputs(1)
                inputs = {k: v.to(token if v.is_floating_point() else token.device) for k, v in inputs.items()}
                try:
                    with torch.random.fork_rng(devices=[]):
                        for _ in range(2):
                            mixer.mechanism(token, context, state=state, need_weights=True, **inputs)
                except ValueError as error:
                    return f"layer {i}, {error}"
        return None


def build_stack(config: ManyheadsConfig, causal: bool | None, *, images: bool = False) -> Stack:
    """Self mixers only. causal None: whatever each mechanism declares, noncausal first."""
    blocks = []
    for i, spec in enumerate(config.encoder_specs()):
        place = f"layers[{i}]"
        pattern = layer_pattern(place, spec, causal, first=Pattern.GRID if images else None)
        blocks.append(ManyheadsBlock(config, Mixer(config, place, spec, pattern)))
    rows, columns = config.patch_grid
    return Stack(config, blocks, rows * columns if images else None)


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
