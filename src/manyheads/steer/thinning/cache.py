"""The cache of a model some of whose tokens leave on the way up: each layer holds what reached it, and no more.

To the library a layer is as long as what was fed, so that positions and masks come out as they would have; what is
held is known by its places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from manyheads.steer.thinning.passes import packed


class ThinLayer(DynamicLayer):  # type: ignore[misc]
    """keys, values [b, g, m, d] of the tokens that reached the layer. places [b, m]: where each stood in all that was
    fed, -1 where a row of the batch has fewer tokens than the longest; None while everything is held. uneven: whether
    there is a -1."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.places: Tensor | None = None
        self.uneven = False
        self.fed = 0
        self._coming: tuple[Tensor | None, int] | None = None

    def expect(self, places: Tensor | None, fed: int, uneven: bool) -> None:
        """Before the layer runs: the places [b, q] of the tokens that come of so many that were fed; None: all."""
        self._coming, self.uneven = (places, fed), self.uneven or uneven

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._coming is None:
            raise ValueError(
                "this cache was made while tokens leave between layers, and can be fed inside of such a block alone: "
                "go on inside, or begin anew without past_key_values"
            )
        (places, fed), self._coming = self._coming, None
        if places is not None or self.places is not None:
            self.places = self.columns(places, fed, key_states.shape[0], key_states.device)
        self.fed += fed
        held: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return held

    def columns(self, places: Tensor | None, fed: int, batch: int, device: torch.device) -> Tensor:
        """The places [b, m] of all keys once those that come have come."""
        held = torch.arange(self.fed, device=device).expand(batch, -1) if self.places is None else self.places
        if places is None:
            places = torch.arange(self.fed, self.fed + fed, device=device).expand(batch, -1)
        return torch.cat([held, places], 1)

    def retain(self, places: Tensor, start: int) -> None:
        """Of what was fed from `start` on only the keys at these places [b, k] (-1: none) are held any longer."""
        if self.keys is None or self.values is None:
            return
        held = self.columns(None, 0, len(self.keys), self.keys.device)
        stays = ((held[:, :, None] == places[:, None]).any(-1) | (held < start)) & (held >= 0)
        order, there = packed(stays)
        self.places = held.gather(1, order).masked_fill(~there, -1)
        self.uneven = not bool(there.all())
        self.keys, self.values = (
            own.gather(2, order[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3]))
            for own in (self.keys, self.values)
        )

    def get_seq_length(self) -> int:
        return self.fed

    @property
    def nbytes(self) -> int:
        held = [self.keys, self.values] if self.is_initialized else []
        return sum(own.numel() * own.element_size() for own in held if own is not None)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens that are taken back; got {tokens_to_remove}")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        self.fed += tokens_to_remove
        if self.places is None:
            super().crop(tokens_to_remove)
            return
        places = self.places.masked_fill(self.places >= self.fed, -1)
        there = (places >= 0).any(0)
        self.places = places[:, there]
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, there], self.values[:, :, there]
        self.uneven = bool((self.places < 0).any())

    def reset(self) -> None:
        super().reset()
        self.places, self.uneven, self.fed, self._coming = None, False, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.places = None if self.places is None else self.places.index_select(0, beam_idx.to(self.places.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.places = None if self.places is None else self.places.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.places = None if self.places is None else self.places[indices.to(self.places.device)]


class ThinCache(DynamicCache):  # type: ignore[misc]
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = [ThinLayer() for _ in range(depth)]

    def expect(self, tokens: int) -> None:
        raise ValueError(
            "prefill_chunk_size feeds a prompt in parts, and which image tokens leave is known from the whole: "
            "leave it out"
        )

    def assist(self) -> None:
        raise ValueError("a model whose image tokens leave cannot guess for another one: leave the block first")


def thin_cache(given: Any, depth: int) -> Any:
    """The cache for a call: a new one where none is given; an empty DynamicCache becomes such a cache in its place."""
    if given is None:
        return ThinCache(depth)
    layers = getattr(given, "layers", [])
    if len(layers) == depth and all(isinstance(layer, ThinLayer) for layer in layers):
        return given
    if type(given) is not DynamicCache or given.get_seq_length():
        raise ValueError(
            f"a {type(given).__name__} that holds {given.get_seq_length()} tokens was given where image tokens leave "
            "between layers: give an empty DynamicCache, or none, and feed the prompt inside the block"
        )
    given.layers, given.layer_class_to_replicate = [ThinLayer() for _ in range(depth)], None
    given.__class__ = ThinCache
    return given
