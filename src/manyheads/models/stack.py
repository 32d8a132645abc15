"""Layers one above the other, and what goes through all of them.

Shapes: b batch, n tokens, e hidden size, m tokens of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.card import Pattern
from manyheads.functional.boxes import TABLES, box_rows, layout_of
from manyheads.functional.kinds import checked_kinds
from manyheads.models.beside import Reader, below, check_beside, weights_below
from manyheads.models.cache import ManyheadsCache
from manyheads.models.configuration import ManyheadsConfig, layer_pattern
from manyheads.models.feed_forward import model_norm
from manyheads.models.layers import ManyheadsBlock, Mixer
from manyheads.models.masks import Masks
from manyheads.state import State


class Trace(NamedTuple):
    """What a stack gives: the last hidden states, and per layer what was asked for."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    cross_attentions: tuple[Tensor | None, ...] | None
    aux_loss: Tensor | None


@dataclass
class _Way:
    """What a pass has left behind so far: states, the embeddings' first, and what the layers gave beside them."""

    hidden: list[Tensor]
    weights: list[Tensor | None] = field(default_factory=list)
    cross_weights: list[Tensor | None] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class Stack(nn.Module):
    """Blocks and a last norm, with positions of a sequence."""

    def __init__(self, config: ManyheadsConfig, blocks: list[ManyheadsBlock], places: int | None = None) -> None:
        super().__init__()
        learned = config.positions == "learned"
        self.places = config.max_position_embeddings if places is None else places
        self.embed_positions = nn.Embedding(self.places, config.hidden_size) if learned else None
        self.box_places, rows = config.max_2d_position_embeddings, TABLES * config.max_2d_position_embeddings
        self.embed_boxes = nn.Embedding(rows, config.hidden_size) if config.positions == "boxes" else None
        self.kinds, self.by_kind = config.num_token_kinds, tuple(config.by_kind)
        self.embed_kinds = nn.Embedding(self.kinds, config.hidden_size) if "embedding" in self.by_kind else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(blocks)
        self.back: Mixer | None = None
        self.back_range = config.back_range
        if config.back is not None and not any(block.cross_attn for block in blocks):
            self.back = Mixer(config, "back", config.back, _back_pattern(config, blocks), also=("higher",))
            self.norm_higher = model_norm(config)
        self.norm = model_norm(config)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        masks: Masks | None = None,
        past_key_values: ManyheadsCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Trace:
        """Hidden states and weights are those of the last pass through each layer, losses those of all."""
        masks, cache = masks or Masks(), past_key_values
        check_beside(masks.beside, self.readers)
        masks = self._kinds_checked(x, masks)
        way, (low, high) = _Way([self.dropout(self._placed(x, masks, cache))]), self.back_range
        whole, start = range(len(self.layers)), 0
        if self.back is not None:
            start = low
            self._through(way, whole[:low], context, masks, cache, output_attentions)
            first = _Way([*way.hidden], [*way.weights])
            self._through(first, whole[low : high + 1], context, masks, cache, False, self._own_memory("first"))
            way.hidden[-1], losses = self._read_back(self.back, way.hidden[-1], first.hidden[-1], masks, cache)
            way.losses += first.losses + losses
        self._through(way, whole[start:], context, masks, cache, output_attentions)
        x = self.norm(way.hidden[-1])
        return Trace(
            x,
            (*way.hidden[:-1], x) if output_hidden_states else None,
            tuple(way.weights) if output_attentions else None,
            tuple(way.cross_weights) if output_attentions and context is not None else None,
            torch.stack(way.losses).sum() if way.losses else None,
        )

    def _through(
        self,
        way: _Way,
        layers: range,
        context: Tensor | None,
        masks: Masks,
        cache: ManyheadsCache | None,
        need_weights: bool,
        memory: int | None = None,
    ) -> None:
        """On through these layers. memory: which of the cache's the first of them has; each its own by default."""
        for place, i in enumerate(layers):
            block: Any = self.layers[i]
            held = None if cache is None else cache.layers[i if memory is None else memory + place]
            card = block.self_attn.mechanism.card
            earlier, shared = below(i, card, way.hidden[1:]), weights_below(i, card, way.weights)
            need = need_weights or self._hands_on(i)
            x, weight, cross_weight, loss = block(
                way.hidden[-1], context, masks, earlier, shared, past_key_values=held, need_weights=need
            )
            way.hidden.append(x)
            way.weights.append(weight)
            way.cross_weights.append(cross_weight)
            way.losses += [] if loss is None else [loss]

    def _hands_on(self, i: int) -> bool:
        """Whether the layer above reads the weights of layer i."""
        blocks: Any = self.layers
        return i + 1 < len(blocks) and "weights_below" in blocks[i + 1].self_attn.mechanism.card.takes

    def _read_back(
        self, back: Mixer, x: Tensor, higher: Tensor, masks: Masks, cache: ManyheadsCache | None
    ) -> tuple[Tensor, list[Tensor]]:
        """x [b, n, e] with what it reads of a higher layer's output added, and the losses of reading."""
        memory = None if cache is None else cache.layers[self._own_memory("back")].self_attention
        inputs = {k: v for k, v in masks.beside.items() if k in back.takes} | {"higher": self.norm_higher(higher)}
        read = back(x, None, masks.self_mask, masks.positions, memory, inputs=inputs)
        return x + self.dropout(read.output), list(read.losses.values())

    # -- what it is told of its tokens ------------------------------------------------------------------------------

    @property
    def readers(self) -> list[Reader]:
        """Who reads what of a call beside its tokens."""
        mixers: list[Any] = [block.self_attn for block in self.layers]
        found = [Reader(f"layer {i}, {m.mechanism.card.name}", m.mechanism.card.takes) for i, m in enumerate(mixers)]
        if self.by_kind:
            words = f"[b, n] integers from 0 to {self.kinds - 1}"
            found.append(Reader(f"the model, with by_kind={list(self.by_kind)}", {"token_kinds": words}))
        if self.embed_boxes is not None:
            words = f"[b, n, 4] integers from 0 to {self.box_places - 1}, x0, y0, x1, y1"
            found.append(Reader('the model, with positions="boxes"', {"boxes": words}))
        return found

    def _kinds_checked(self, x: Tensor, masks: Masks) -> Masks:
        if not self.by_kind:
            return masks
        kinds = checked_kinds("the model", masks.beside["token_kinds"], x, _padding(masks), self.kinds)
        return masks._replace(beside={**masks.beside, "token_kinds": kinds})

    def _placed(self, x: Tensor, masks: Masks, cache: ManyheadsCache | None) -> Tensor:
        """Told where its tokens stand, and of what kind they are."""
        if self.embed_boxes is not None:
            rows = box_rows("the model", masks.beside["boxes"], x, _padding(masks), self.box_places)
            x = x + layout_of(self.embed_boxes.weight.unflatten(0, (TABLES, -1)), rows)
        if self.embed_kinds is not None:
            x = x + self.embed_kinds(masks.beside["token_kinds"])
        if "positions" in self.by_kind and self.embed_positions is not None:
            return x + self.embed_positions(self._counted_apart(x, masks, cache))
        return self._positioned(x, masks.positions, cache)

    def _counted_apart(self, x: Tensor, masks: Masks, cache: ManyheadsCache | None) -> Tensor:
        """Of each token, how many of its kind stand before it, [b, n]."""
        kinds, real, n = masks.beside["token_kinds"], _padding(masks), x.shape[1]
        of = nn.functional.one_hot(kinds, self.kinds).to(torch.int32)
        if cache is not None:
            memory = cache.layers[self._own_memory("kinds")].self_attention
            state, new = memory.state("kinds", lambda: State("the count of kinds", len(x))), real
            seen = state.length
            usual = torch.ones(1, seen + n, dtype=torch.bool, device=x.device)
            of, real = state.append("kinds", of), state.append_optional("padding", real, usual)
            state.advance(n)
            state.note(new, seen)
        counted = of if real is None else of * real[..., None]
        places = counted.cumsum(1)[:, -n:].gather(2, kinds[..., None])[..., 0] - 1
        places = places.clamp(min=0)  # of padding
        if not (torch.compiler.is_compiling() or places.is_meta) and int(places.max()) >= self.places:
            raise ValueError(
                f"{int(places.max()) + 1} tokens of a kind, but max_position_embeddings={self.places} positions were "
                "learned; shorten the input, or build the model with more"
            )
        return places

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

    # -- what it remembers ------------------------------------------------------------------------------------------

    @property
    def own(self) -> dict[str, int]:
        """What is remembered besides what each layer is, by name, and how many memories that takes."""
        low, high = self.back_range
        found = {} if self.back is None else {"back": 1, "first": high + 1 - low}
        return found | ({"kinds": 1} if "positions" in self.by_kind else {})

    @property
    def memories(self) -> int:
        """How many layers its cache has."""
        return len(self.layers) + sum(self.own.values())

    def _own_memory(self, name: str) -> int:
        """The first of the cache's that is of this name."""
        before = list(self.own)[: list(self.own).index(name)]
        return len(self.layers) + sum(self.own[each] for each in before)

    @property
    def can_cache(self) -> bool:
        return self.obstacle is None

    @property
    def forgets(self) -> bool:
        """Whether transformers takes the cache from its layers: they are passed twice."""
        blocks: Any = self.layers
        return any(block.gradient_checkpointing and block.training for block in blocks)

    def _mixers(self) -> list[tuple[str, Mixer]]:
        found: list[tuple[str, Any]] = []
        blocks: Any = self.layers
        for i, block in enumerate(blocks):
            found += [(f"layer {i}", mixer) for mixer in (block.self_attn, block.cross_attn) if mixer is not None]
        return found + ([] if self.back is None else [("back", self.back)])

    @property
    def obstacle(self) -> str | None:
        """The first mechanism that cannot decode step by step, None where all can."""
        for place, mixer in self._mixers():
            mechanism = mixer.mechanism
            if not (mechanism.card.decodes and mechanism.causal):
                return f"{place}, {mechanism.card.name}"
        return None

    @torch.no_grad()
    def weights_obstacle(self) -> str | None:
        """The first mechanism that gives no weights once it has a state, found by asking each for two tokens'; None
        where all do."""
        crossed: list[Any] = [block.cross_attn for block in self.layers]
        for place, mixer in self._mixers():
            if mixer is self.back:
                continue
            token = self.norm.weight.new_zeros(1, 1, self.norm.weight.shape[0])
            context = token if any(mixer is other for other in crossed) else None
            state, inputs = mixer.mechanism.init_state(1), mixer.mechanism.example_inputs(1)
            inputs = {k: v.to(token if v.is_floating_point() else token.device) for k, v in inputs.items()}
            try:
                with torch.random.fork_rng(devices=[]):
                    for _ in range(2):
                        mixer.mechanism(token, context, state=state, need_weights=True, **inputs)
            except ValueError as error:
                return f"{place}, {error}"
        return None


def _padding(masks: Masks) -> Tensor | None:
    """Of this pass, [b, n], where the mask says it."""
    return masks.self_mask if masks.self_mask is not None and masks.self_mask.ndim == 2 else None


def _back_pattern(config: ManyheadsConfig, blocks: list[ManyheadsBlock]) -> Pattern:
    causal = all(block.self_attn.mechanism.causal for block in blocks)
    return layer_pattern("back", config.back, causal)


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
