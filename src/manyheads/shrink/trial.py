"""Tokens on trial: guesses of a draft, which may be taken back after entries were dropped for them.

A pass that checks guesses must give each the logits that it would have if it came alone, else what a shrunk model says
with a draft is not what it says without. So a layer takes the tokens of such a pass one by one, dropping entries after
each, and remembers how it stood before the first: `crop` goes back there and takes the accepted ones again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.hosts.attend import pack
from manyheads.shrink.compress import Pass

if TYPE_CHECKING:
    from manyheads.hosts.attend import Scoring
    from manyheads.hosts.visibility import Visibility


class Trial:
    """How a layer stood before its first token on trial, and those tokens: rows [b, H, 1, ...] and passes."""

    def __init__(self, layer: Any) -> None:
        # The store and what a policy notes are written to in place, the others are replaced.
        self._before = {name: copy.deepcopy(getattr(layer, name)) for name in ("store", "memo")}
        self._before |= {name: getattr(layer, name) for name in ("seen", "shares", "last", "heard")}
        self._tokens: list[tuple[dict[str, Tensor], Pass]] = []

    @property
    def count(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes held for taking back."""
        rows = [row.nbytes for new, _ in self._tokens for row in new.values()]
        memos = [own.nbytes for own in self._before["memo"].values()]
        return int(self._before["store"].nbytes) + sum(rows) + sum(memos)

    def add(self, new: dict[str, Tensor], done: Pass) -> None:
        self._tokens.append((new, done))

    def take_back(self, layer: Any, remove: int) -> None:
        """Leaves the layer as if the last `remove` tokens had never come."""
        if not remove:
            return
        for name, own in self._before.items():
            setattr(layer, name, own)
        with torch.no_grad(), _off_record(layer):
            for new, done in self._tokens[: self.count - remove]:
                layer.take(new)
                layer.finish(done)

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        before = self._before
        before["store"].on_batch(change)
        before["memo"] = {name: change(own) for name, own in before["memo"].items()}
        before["heard"] = tuple(done.on_batch(change) for done in before["heard"])
        before["last"] = None if before["last"] is None else before["last"].on_batch(change)
        shares = before["shares"]
        before["shares"] = shares if shares is None or shares.shape[0] == 1 else change(shares)
        self._tokens = [
            ({name: change(row) for name, row in new.items()}, done.on_batch(change)) for new, done in self._tokens
        ]


@contextmanager
def _off_record(layer: Any) -> Iterator[None]:
    """Within it a layer drops at once."""
    layer.record_past = False
    try:
        yield
    finally:
        layer.record_past = True


def in_parts(layer: Any, new: dict[str, Tensor], query: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
    """A pass [b, h, n, d] -> [b, n, h, dv]: first what of it is certain, then the guesses."""
    n = query.shape[2]
    # A single token may always be taken back: a decision to stop can come one step late.
    certain = 0 if layer.guesses is None or layer.trial is not None or n == 1 else max(0, n - layer.guesses)
    out = []
    with _off_record(layer):
        if certain:
            layer.take(_rows(new, 0, certain))
            out.append(layer.answer(query[:, :, :certain], scoring, seen.part(0, certain)))
        if layer.drops:
            out += [
                _on_trial(layer, _rows(new, i, i + 1), query[:, :, i : i + 1], scoring, seen.part(i, i + 1))
                for i in range(certain, n)
            ]
            certain = n
    if certain < n:
        # Nothing is dropped for guesses: they may come together, and wait for `crop`.
        layer.take(_rows(new, certain, n))
        out.append(layer.answer(query[:, :, certain:], scoring, seen.part(certain, n)))
    return torch.cat(out, 1)


def _on_trial(layer: Any, new: dict[str, Tensor], query: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
    if layer.trial is None:
        layer.trial = Trial(layer)
    layer.take(new)
    layer.trial.add(new, Pass(pack(query, new["keys"].shape[1]), scoring, seen))
    out: Tensor = layer.answer(query, scoring, seen)
    return out


def _rows(new: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: row[:, :, start:stop] for name, row in new.items()}


def without_last(passes: list[Pass], count: int) -> list[Pass]:
    """The passes less their last `count` queries."""
    left = []
    for done in reversed(passes):
        own = done.queries.shape[3]
        if count < own:
            left.append(done.first_queries(own - count))
        count = max(0, count - own)
    return left[::-1]


def starts_again(positions: Tensor | None) -> bool:
    """Whether a pass of several tokens is at the beginning of a text."""
    return positions is not None and positions.shape[-1] > 1 and not bool(positions[..., 0].any())
