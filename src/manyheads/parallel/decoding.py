"""Decoding with a cache that is spread: each process keeps its tokens' keys and values, and all read a new token's.

Shapes: b rows, h query heads, g key/value heads, m tokens that this process keeps, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.functional.linear import causal_read, widen
from manyheads.functional.precision import own_dtype
from manyheads.parallel.layout import Layout
from manyheads.parallel.states import whole_memory
from manyheads.parallel.wire import all_gather


@dataclass
class Kept:
    """Of one layer: keys [b, g, m, d] and values, the places [m] of these tokens, and real [b, m] of them or None."""

    keys: Tensor
    values: Tensor
    places: Tensor
    real: Tensor | None


class Memory:
    """What the layers remember of a sequence, in the order in which they ask.

    Keys and values of softmax layers lie where their tokens do; of a new token in the process whose turn it is. A token
    sends, for each such layer, b h (d + 1) numbers of every process to every other, however long the sequence is. A
    linear layer's memory and a convolution's last rows are small, and every process has them all.
    """

    def __init__(self, layout: Layout, padding: Tensor | None) -> None:
        self.layout, self.padding, self.length = layout, padding, layout.length
        self._layers: list[Any] = []
        self._at = 0

    @property
    def nbytes(self) -> int:
        """Bytes that this process holds."""
        found = 0
        for layer in self._layers:
            tensors = vars(layer).values() if isinstance(layer, Kept) else [layer]
            found += sum(x.nbytes for x in tensors if x is not None)
        return found

    def begin_token(self) -> None:
        """Another pass, of one token."""
        self.length += 1
        self._at = 0

    # -- the first pass --

    def keep_pairs(self, k: Tensor, v: Tensor) -> None:
        self._layers.append(Kept(k, v, self.layout.index().to(k.device), self.padding))

    def keep_sums(self, k: Tensor, v: Tensor, kernel: Any, slopes: Tensor | None) -> None:
        self._layers.append(whole_memory(k, v, self.layout, kernel, padding=self.padding, slopes=slopes))

    def keep_rows(self, x: Tensor, count: int) -> None:
        """The last rows of the sequence, which several processes may hold."""
        size, mine = self.layout.place.size, x[:, max(0, x.shape[1] - count) :]
        padded = torch.cat((x.new_zeros(x.shape[0], count - mine.shape[1], *x.shape[2:]), mine), 1)
        everyone = all_gather(padded, self.layout.place)
        held = [everyone[rank][:, count - min(count, self.layout.count(rank)) :] for rank in range(size)]
        # Zeros before all of them, where the sequence is shorter than that.
        joined = torch.cat([torch.zeros_like(padded), *held], 1)
        self._layers.append(joined[:, joined.shape[1] - count :])

    def keep_total(self, total: Tensor) -> None:
        """A sum over all tokens."""
        self._layers.append(total)

    # -- each token after it --

    def _next(self) -> int:
        self._at += 1
        return self._at - 1

    def read_pairs(self, q: Tensor, k: Tensor, v: Tensor, scale: float, windows: Sequence[int] | None) -> Tensor:
        """q [b, h, 1, d] over all keys so far, the token's own among them."""
        kept: Kept = self._layers[self._next()]
        at, place = self.layout.place, self.length - 1
        if place % at.size == at.rank:
            self._append(kept, k, v, place)
        if windows is not None:
            self._forget(kept, place - max(windows))
        queries = widen(q[:, :, 0].unflatten(1, (k.shape[1], -1)))  # [b, g, r, d]
        with own_dtype(queries):
            scores = queries * scale @ widen(kept.keys).mT  # [b, g, r, m]
        if windows is not None:
            reach = torch.tensor(windows, device=q.device).view(1, k.shape[1], -1, 1)
            scores = scores.masked_fill(place - kept.places >= reach, -torch.inf)
        if kept.real is not None:
            scores = scores.masked_fill(~kept.real[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
        with own_dtype(queries):
            everyone = all_gather(torch.cat((weights @ widen(kept.values), lse), -1), at)
        outs, lses = everyone[..., :-1], everyone[..., -1:]
        return (outs * lses.softmax(0)).sum(0).flatten(1, 2)[:, :, None].to(q.dtype)

    def _append(self, kept: Kept, k: Tensor, v: Tensor, place: int) -> None:
        kept.keys, kept.values = torch.cat((kept.keys, k), 2), torch.cat((kept.values, v), 2)
        kept.places = torch.cat((kept.places, kept.places.new_tensor([place])))
        if kept.real is not None:
            kept.real = torch.cat((kept.real, kept.real.new_ones(len(kept.real), 1)), 1)

    def _forget(self, kept: Kept, last: int) -> None:
        """What no window reaches any more."""
        near = kept.places > last
        if bool(near.all()):
            return
        kept.keys, kept.values, kept.places = kept.keys[:, :, near], kept.values[:, :, near], kept.places[near]
        kept.real = None if kept.real is None else kept.real[:, near]

    def read_sums(self, q: Tensor, k: Tensor, v: Tensor, kernel: Any, slopes: Tensor | None) -> Tensor:
        layer = self._next()
        read = causal_read(q, k, v, kernel, memory=self._layers[layer], slopes=slopes, keep=True)
        self._layers[layer] = read.memory
        return read.mixed.to(q.dtype)

    def read_total(self, x: Tensor) -> Tensor:
        """The sum over all before this token, to which its own x is added."""
        layer = self._next()
        before: Tensor = self._layers[layer]
        self._layers[layer] = before + x
        return before

    def read_rows(self, x: Tensor) -> Tensor:
        layer = self._next()
        held: Tensor = self._layers[layer]
        self._layers[layer] = torch.cat((held, x), 1)[:, 1:]
        return held


# What a generation_config may hold that changes what is chosen, and where it changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,), "guidance_scale": (1,),
    "bad_words_ids": (), "sequence_bias": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "begin_suppress_tokens": (), "stop_strings": (), "max_time": (),
}  # fmt: skip


def _told(
    model: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[list[int], int | None, Tensor]:
    """Tokens that end a row, that which fills it up, if one is known, and those never chosen, as `generate` has
    them: the generation_config's where the caller says nothing. ValueError for what it holds that is not done here."""
    config = getattr(model, "generation_config", None)
    others = {name: getattr(config, name, None) for name in _NEUTRAL}
    if wrong := {name: own for name, own in others.items() if own is not None and own not in _NEUTRAL[name]}:
        raise ValueError(
            f"generate: model.generation_config has {wrong}, which greedy decoding over several processes has not; "
            "unset it, or generate in one process"
        )
    end = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
    ends = [] if end is None else [int(one) for one in (end if isinstance(end, Sequence) else [end])]
    pad = getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id
    never = torch.tensor(getattr(config, "suppress_tokens", None) or [], dtype=torch.long)
    return ends, pad, never


@torch.no_grad()
def greedy(
    spread: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> Tensor:
    """See `Spread.generate`."""
    b = len(input_ids)
    ends, pad, never = _told(model, eos_token_id, pad_token_id)
    if attention_mask is None and pad is not None and pad not in ends and bool((input_ids == pad).any()):
        # As `generate` takes it, where no mask says otherwise.
        attention_mask = (input_ids != pad).long()
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} was given; want 1 or more")
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "generate: the attention_mask ends in padding; want it on the left, so that all rows go on alike"
        )
    if model.training:
        raise ValueError(f"generate: {type(model).__name__} is in training mode; call model.eval() first")
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": input_ids, "position_ids": positions, "attention_mask": real}
    logits = spread.first_pass(model, batch)
    ids, over = input_ids, torch.zeros(b, dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        scores = logits[:, -1].index_fill(-1, never.to(logits.device), -torch.inf)
        chosen = spread.agreed(scores.argmax(-1), first=step == 0)
        if ends:
            chosen = torch.where(over, chosen.new_tensor(ends[0] if pad is None else pad), chosen)
            over = over | torch.isin(chosen, chosen.new_tensor(ends))
        ids = torch.cat((ids, chosen[:, None]), 1)
        if step == max_new_tokens - 1 or bool(over.all()):
            break
        logits = spread.next_pass(model, chosen[:, None], positions[:, -1:] + step + 1)
    return ids
