"""Decode states of mechanisms as a Hugging Face cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from manyheads.state import State, hidden_first


@dataclass
class Pass:
    """One recorded pass through a sublayer: what was remembered before it, and what it was called with."""

    seen: int
    before: dict[str, State]
    mixer: Callable[[], nn.Module | None]
    x: Tensor
    context: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    inputs: Mapping[str, Tensor]

    def repeat(self, memory: Memory, tokens: int) -> None:
        """The pass again, over its first tokens only."""
        mixer, mask = self.mixer(), self.mask
        assert mixer is not None, "the model that filled this cache is gone"
        if mask is not None and self.context is None:
            mask = mask[:, :tokens] if mask.ndim == 2 else mask[:, :, :tokens, : self.seen + tokens]
        positions = None if self.positions is None else self.positions[:, :tokens]
        with torch.no_grad():
            inputs = {name: value[:, :tokens] for name, value in self.inputs.items()}
            mixer(self.x[:, :tokens], self.context, mask, positions, memory, inputs=inputs)


class Memory:
    """What one sublayer remembers: the state of its mechanism, and that of the convolution before it.

    While recording, every pass is kept until the next crop, so that any state can go back: one that cannot be
    truncated (a recurrence, a window) is put back to where the pass began, and the tokens that stay are passed again.
    """

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.recording = False
        self.recorded: list[Pass] = []

    @property
    def length(self) -> int:
        return next((state.length for state in self.states.values()), 0)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def state(self, name: str, make: Callable[[], State]) -> State:
        if name not in self.states:
            self.states[name] = make()
        return self.states[name]

    def record(self, mixer: nn.Module, *called_with: Any) -> None:
        """called_with: x, context, mask, positions and inputs of a pass that is about to begin."""
        if self.recording:
            before = {name: _snapshot(state) for name, state in self.states.items()}
            self.recorded.append(Pass(self.length, before, weakref.ref(mixer), *called_with))

    def crop(self, tokens: int) -> None:
        """Takes back the last tokens."""
        target = self.length - tokens
        cut = {name: _snapshot(state) for name, state in self.states.items()}
        try:
            for state in cut.values():
                state.truncate(target)
            self.states = cut
        except ValueError as error:
            self._go_back(target, error)
        self.recorded.clear()

    def _go_back(self, target: int, error: ValueError) -> None:
        while self.recorded:
            last = self.recorded.pop()
            if last.seen <= target:
                recording, self.recording, self.states = self.recording, False, last.before
                if target > last.seen:
                    last.repeat(self, target - last.seen)
                self.recording = recording
                return
        raise ValueError(f"{error} (or call cache.activate_past_recording() before the passes to be taken back)")

    def reorder(self, index: Tensor) -> None:
        self.recorded.clear()
        for state in self.states.values():
            state.reorder(index)


class ManyheadsCacheLayer(CacheLayerMixin):
    """The memories of one layer: of its self mixer and, in a decoder, of its cross mixer."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = Memory()
        self.cross_attention = Memory()

    @property
    def memories(self) -> tuple[Memory, Memory]:
        return self.self_attention, self.cross_attention

    @property
    def nbytes(self) -> int:
        """Bytes held, with what is allocated ahead."""
        return sum(memory.nbytes for memory in self.memories)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the states of a ManyheadsCache are made and filled by its mechanisms")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the states of a ManyheadsCache are made and filled by its mechanisms")

    def get_seq_length(self) -> int:
        """Tokens seen, whatever is kept of them."""
        return self.self_attention.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for memory in self.memories:
            memory.states.clear()
            memory.recorded.clear()

    def offload(self) -> None:
        raise NotImplementedError("a ManyheadsCache cannot be offloaded; use cache_implementation=None")

    def prefetch(self) -> None:
        raise NotImplementedError("a ManyheadsCache cannot be offloaded; use cache_implementation=None")

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): want how many tokens to remove, as a negative number or 0")
        for memory in self.memories:
            if memory.states:
                memory.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        for memory in self.memories:
            memory.recording = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for memory in self.memories:
            memory.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for memory in self.memories:
            for state in memory.states.values():
                state.reorder(torch.arange(state.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


class ManyheadsCache(Cache):
    """The decode states of a model with `layers` decoder layers; the passes of the model fill it."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[ManyheadsCacheLayer() for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes held, with what is allocated ahead."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def max_cache_len(self) -> int:
        """-1: it grows, as get_max_length says of layers; PEFT asks a cache by this name."""
        return -1

    def after(self, tokens: int) -> Cache:
        """After a pass of so many tokens: what the caller goes on with."""
        return self

    def tell(self, real: Tensor) -> None:
        """From now on those of the tokens seen are real that are in `real`, [batch, seen]. Raises ValueError, and
        changes nothing, where a state cannot take back what it was fed."""
        states = [state for layer in self.layers for state in layer.self_attention.states.values()]
        # All were fed alike, so that in the usual case one is asked.
        if not states or (hidden_first(real) and states[0].agrees(real)):
            return
        for state in states:
            why = state.obstacle(real)
            if why:
                raise ValueError(why)
        for state in states:
            state.tell(real)


def _snapshot(state: State) -> State:
    """A copy that later passes on the original leave alone. Rows are shared while they are only ever added to; a buffer
    that has dropped rows at its front moves the others about to make room, so the original goes on with its own."""
    kept = State(state.owner, state.batch)
    vars(kept).update(vars(state))
    kept.fixed, kept.context, kept.grown = dict(state.fixed), dict(state.context), {}
    for name, buffer in state.grown.items():
        kept.grown[name] = copy.copy(buffer)
        if buffer.start and buffer.data is not None:
            buffer.data = buffer.data.clone()
    return kept
