"""One pass of a model whose tokens leave: which are still there, and what a layer must be given for them.

Legend: b batch, n tokens fed, q still there, m keys, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import given_cache

# What a decoder layer may be given that says something of every token.
_KNOWN = {"attention_mask", "position_embeddings", "position_ids", "cache_position"}


def packed(stays: Tensor) -> tuple[Tensor, Tensor]:
    """stays [b, n] bool -> the places [b, q] of those that do, in order, q being those of the fullest row; and [b, q]:
    which are there. A shorter row is filled with its own last one."""
    counts = stays.sum(1, keepdim=True)
    width = int(counts.max())
    order = stays.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    there = torch.arange(width, device=order.device) < counts
    return torch.where(there, order, order.gather(1, (counts - 1).clamp_min(0))), there


class Pass:
    """image, real [b, n]: image tokens, and what is no padding. start: tokens that came before. places [b, q]: of those
    still there, in what was fed; a row shorter than the longest is filled with its own last token once more, which
    computes what that computes and whose keys nobody sees."""

    def __init__(self, image: Tensor, real: Tensor, start: int):
        self.image, self.real, self.start = image & real, real, start
        self.has_image = bool(self.image.any())
        self.places = torch.arange(image.shape[1], device=image.device).expand(image.shape[0], -1)
        self.none = torch.empty(0, device=image.device)
        self.left = self.uneven = False
        self._there = torch.ones_like(image)
        self._whole = self.none
        self._masks: dict[int, Tensor] = {}

    @classmethod
    def of(cls, ids: Tensor, image: Tensor, kwargs: dict[str, Any]) -> Pass:
        """Of what the text's stack of layers is called with; ValueError for what cannot be followed."""
        cache, mask, n = given_cache(kwargs), kwargs.get("attention_mask"), ids.shape[1]
        start = 0 if cache is None else int(cache.get_seq_length())
        real = torch.ones_like(image)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError("image tokens can leave where attention_mask is [b, n] with 1 for what is no padding")
            real = mask[:, start : start + n].bool()
        _check_rows(kwargs.get("position_ids"), real)
        return cls(image, real, start)

    def here(self, each: Tensor) -> Tensor:
        """[b, n] bool of what was fed -> [b, q] of what is there; filling is nothing."""
        return each.gather(1, self.places) & self._there

    def leave(self, stays: Tensor, states: Tensor) -> Tensor:
        """The states [b, q', D] of what stays; words do, and padding leaves where any token does."""
        if stays.shape != self.places.shape or stays.dtype != torch.bool:
            raise ValueError(f"a rule says which stay as bool {list(self.places.shape)}; got {list(stays.shape)}")
        image = self.here(self.image)
        if not bool((image & ~stays).any()):
            return states
        stays = torch.where(image, stays, self.here(self.real))
        if not bool(stays.any(1).all()):
            raise ValueError("a row of the batch would have no token left: each needs a word or an image token")
        self._whole = self.whole_again(states)
        order, self._there = packed(stays)
        self.places = self.places.gather(1, order)
        self.left, self.uneven = True, not bool(self._there.all())
        self._masks = {}
        return states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    def whole_again(self, states: Tensor) -> Tensor:
        """[b, n, D]: each token's state, or that in which it left."""
        if not self.left:
            return states
        rows = torch.arange(len(states), device=states.device)[:, None].expand_as(self.places)
        there = self._there
        return self._whole.index_put((rows[there], self.places[there]), states[there])

    @property
    def held(self) -> Tensor:
        """[b, q]: where what is there stands in all that was fed; -1 for filling."""
        return (self.start + self.places).masked_fill(~self._there, -1)

    def fitted(self, kwargs: dict[str, Any], held: Any) -> dict[str, Any]:
        """The arguments of a layer for what is there now, and for the keys that its cache, if any, holds."""
        n, coming = self.image.shape[1], None
        if self.left:
            kwargs = self._narrowed(kwargs)
            coming = self.held
        if coming is not None or (held is not None and held.places is not None):
            kwargs = {**kwargs, "attention_mask": self._seen(kwargs.get("attention_mask"), held, coming)}
        if held is not None:
            held.expect(coming, n, self.uneven)
        return kwargs

    def _narrowed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name, own in kwargs.items() if isinstance(own, Tensor) and name not in _KNOWN]
        turns = kwargs.get("position_embeddings")
        if unknown or (turns is not None and any(own.ndim != 3 for own in turns)):
            raise ValueError(
                f"image tokens cannot leave layers that are given {unknown or 'positions in several dimensions'}"
            )
        kwargs = dict(kwargs)
        if turns is not None:
            kwargs["position_embeddings"] = tuple(self._rows(own) for own in turns)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].expand(len(self.places), -1).gather(1, self.places)
        return kwargs

    def _rows(self, turn: Tensor) -> Tensor:
        turn = turn.expand(len(self.places), -1, -1)
        return turn.gather(1, self.places.unsqueeze(-1).expand(-1, -1, turn.shape[-1]))

    def _seen(self, mask: Any, held: Any, coming: Tensor | None) -> Tensor | None:
        """The layer's mask [b, h or 1, q, m] of the one [.., n, fed] that the library made, or None for none."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
            raise ValueError('image tokens can leave where attn_implementation is "sdpa" or "eager"')
        if mask is None and not (self.uneven or (held is not None and held.uneven)):
            return None
        # Layers that held everything before this pass, or nothing, are alike.
        if held is None or held.places is None:
            if id(mask) not in self._masks:
                self._masks[id(mask)] = _cut(mask, self.places, self._keys(held, coming), self.start)
            return self._masks[id(mask)]
        return _cut(mask, self.places, self._keys(held, coming), self.start)

    def _keys(self, held: Any, coming: Tensor | None) -> Tensor:
        if held is None:
            assert coming is not None
            return coming
        keys: Tensor = held.columns(coming, self.image.shape[1], len(self.image), self.image.device)
        return keys


def _cut(mask: Tensor | None, rows: Tensor, keys: Tensor, start: int) -> Tensor:
    """rows [b, q] of this pass, keys [b, m] of all that was fed, -1 where there is none."""
    there = (keys >= 0)[:, None, None]
    if mask is None:
        return ((keys[:, None] <= start + rows[..., None]) & there[:, 0]).unsqueeze(1)
    mask = mask.expand(len(rows), -1, -1, -1)
    h, q, m = mask.shape[1], rows.shape[1], keys.shape[1]
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, h, -1, mask.shape[3]))
    mask = mask.gather(3, keys.clamp_min(0)[:, None, None].expand(-1, h, q, m))
    return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, torch.finfo(mask.dtype).min)


def _check_rows(positions: Any, real: Tensor) -> None:
    """Texts that are packed into one row begin anew in the middle of it."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return
    back = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    if bool(back.any()):
        raise ValueError("position_ids begin anew within a row: packed texts cannot be thinned; give each a row")
