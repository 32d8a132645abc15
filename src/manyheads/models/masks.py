"""Hugging Face's attention masks and position ids, read as the mechanisms take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.models.beside import NOTHING, Beside
from manyheads.models.cache import ManyheadsCache

HIDES = -1e4  # added to a score, leaves nothing of it in any dtype


class Masks(NamedTuple):
    """self_mask: [b, n] padding of this pass, or dense [b, 1 or h, n, total]. context_mask: [b, m]. positions: [b, n],
    None where they are as usual. beside: what else is said of the tokens of this pass, by name, [b, n, ...]; of graphs
    the edges of all of the batch as of one, [2, edges], and what goes with them."""

    self_mask: Tensor | None = None
    context_mask: Tensor | None = None
    positions: Tensor | None = None
    beside: Beside = NOTHING


def read_masks(
    attention_mask: Tensor | None, position_ids: Tensor | None, x: Tensor, cache: ManyheadsCache | None = None
) -> Masks:
    """From Hugging Face's attention mask [b, seen + n], 1 = real, and position ids [b or 1, n]. The cache is told what
    the mask says of the tokens that it has seen.

    Only what says something is kept: neither a mask of ones nor positions that count up as usual. Positions that are
    not given follow the mask, so that left padding does not shift them.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    n, total = x.shape[1], seen + x.shape[1]
    if attention_mask is not None and attention_mask.ndim == 4:
        return Masks(_dense(attention_mask), positions=position_ids)
    real = None
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (x.shape[0], total):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; want {[x.shape[0], total]}, one entry for "
                f"each of the {seen} tokens in the cache and the {n} new ones"
            )
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
        real = attention_mask[:, -n:].bool()
        if cache is not None and seen:
            cache.tell(attention_mask[:, :seen].bool())
    if torch.compiler.is_compiling():
        return Masks(real, positions=position_ids)
    return worth_saying(Masks(real, positions=position_ids), n, seen)


def _dense(mask: Tensor) -> Tensor:
    """A 4-D mask as booleans, True = may attend; what is added to scores, as transformers makes it, where that hides
    or leaves alone."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(
            "a 4-D attention_mask is boolean, True = may attend, or of floating point and added to scores; got "
            f"{mask.dtype}"
        )
    seen, hidden = mask == 0, mask <= HIDES
    if not bool((seen | hidden).all()):
        raise ValueError(
            "a 4-D attention_mask that is not boolean is added to scores: 0 where a key may be attended to and at most "
            f"{HIDES} where not; scores that are only changed are not a mask"
        )
    return seen


def worth_saying(masks: Masks, n: int, seen: int = 0) -> Masks:
    """Without a padding of ones, and without positions that count on from `seen` as usual."""
    real, positions = masks.self_mask, masks.positions
    if positions is not None:
        same = positions == torch.arange(seen, seen + n, device=positions.device)
        if bool((same if real is None else same | ~real).all()):
            positions = None
    return masks._replace(self_mask=None if real is None or bool(real.all()) else real, positions=positions)


def real_tokens(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()


def real_places(name: str, mask: Tensor) -> Tensor:
    """A mask of pixels or nodes, nonzero = real; ValueError for one that is added to scores, the contrary of it."""
    asked = mask.is_floating_point() and not mask.is_meta and not torch.compiler.is_compiling()
    if asked and bool((mask < 0).any()):
        raise ValueError(f"{name} holds values below zero, as what is added to scores; want nonzero = real")
    return mask.bool()
