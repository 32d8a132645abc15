"""Calls of attention layers, as taps see them: queries, keys, values, outputs, and weights on demand.

Legend: b batch, h query heads, g KV heads, n queries, m keys, d key dim, e value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from manyheads.hosts.attend import Scoring, hides, masked_scores, pack, probabilities, weigh
from manyheads.hosts.sites import Site
from manyheads.mechanism import Result

# Weights in one block of rows: 2^20 float32 numbers are 4 MiB, and the steps of a softmax hold six of them.
BLOCK_WEIGHTS = 2**20
# A weight block and its rows -> the block that takes its place.
Edit = Callable[[Tensor, slice], Tensor]
# A block of scores [b, heads, rows, m], before masks and position biases, and its rows -> those in its place.
Rescore = Callable[[Tensor, slice], Tensor]

# A call, some of its heads, rows, and the weights [b, heads, rows, m] that took the place of the layer's own.
Hearer = Callable[["AttentionCall", list[int], slice, Tensor], None]
_hearers: ContextVar[tuple[Hearer, ...]] = ContextVar("edits", default=())


@contextmanager
def edits_heard(hear: Hearer) -> Iterator[None]:
    """While open, in this thread, `hear` gets the weights that readers of taps put in the place of a layer's own, block
    by block: they leave nothing but another output behind."""
    token = _hearers.set((*_hearers.get(), hear))
    try:
        yield
    finally:
        _hearers.reset(token)


class AttentionCall:
    """One call of an attention layer. query [b, h, n, d], key [b, g, m, d], value [b, g, m, e], output [b, h, n, e];
    query and key as they are scored, after rotation. mask [b or 1, 1 or h, n, m]: bool (True = may attend) or added to
    the scores; None: all, or with `causal` those before."""

    # Whether the weights of a row are shares of one, none of them negative.
    shares = True

    def __init__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring
    ):
        self.site, self.query, self.key, self.value = site, query, key, value
        self._mask, self.causal, self._scoring = mask, causal, scoring
        self._output: Tensor | Callable[[], Tensor]
        # Whether the output keeps its gradient, which a tensor does not tell without a warning.
        self.keeps_gradient = False
        # Of the weights, in this pass.
        self.dropout = 0.0
        # A reader's notes on this call, which are there again when backward computes the layer anew.
        self.memo: dict[str, Any] = {}

    @property
    def output(self) -> Tensor:
        """Computed when it is first asked for, where its maker left that open: a reader that puts another in its place
        without a look at it then costs no second pass."""
        if callable(self._output):
            self._output = self._output()
        return self._output

    @output.setter
    def output(self, value: Tensor | Callable[[], Tensor]) -> None:
        self._output = value

    @property
    def layer(self) -> int:
        return self.site.layer

    @property
    def mask(self) -> Tensor | None:
        return self._mask

    @property
    def scoring(self) -> Scoring:
        return self._scoring

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def scale(self) -> float:
        return self.scoring.scale

    def allowed(self, rows: slice) -> Tensor | None:
        """What queries of these rows may see, [b or 1, 1 or h, rows, m]: bool or added; None where it is everything."""
        if self.mask is not None:
            return self.mask[:, :, rows]
        if not self.causal:
            return None
        n, m = self.query.shape[2], self.key.shape[2]
        start, stop, _ = rows.indices(n)
        device = self.query.device
        return (torch.arange(start, stop, device=device)[:, None] >= torch.arange(m, device=device))[None, None]

    def weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """softmax of the scores, [b, heads, rows, m], float32 at least; all heads and rows unless told otherwise."""
        query, key, scoring, seen = self._select(heads, rows)
        return probabilities(query, key, scoring, seen).flatten(1, 2)

    def _select(self, heads: Sequence[int] | None, rows: slice) -> tuple[Tensor, Tensor, Scoring, Tensor | None]:
        seen, query = self.allowed(rows), self.query[:, :, rows]
        alike = seen is None or seen.shape[1] == 1
        if heads is None and alike:
            return pack(query, self.key.shape[1]), self.key, self.scoring, seen
        chosen = torch.tensor(self.check_heads(heads), device=query.device)
        sinks = None if self.scoring.sinks is None else self.scoring.sinks.index_select(0, chosen)
        if seen is not None and not alike:
            seen = seen.index_select(1, chosen)
        own = Scoring(self.scoring.scale, self.scoring.softcap, sinks)
        return query.index_select(1, chosen).unsqueeze(2), self.of_heads(self.key, chosen), own, seen

    def of_heads(self, rows: Tensor, heads: Sequence[int] | Tensor) -> Tensor:
        """Keys or values [b, g, m, d] that the given query heads read, [b, heads, m, d]."""
        heads = torch.as_tensor(heads, device=rows.device)
        if rows.shape[1] == self.heads and heads.numel() == self.heads:
            return rows
        return rows.index_select(1, heads // (self.heads // rows.shape[1]))

    def check_heads(self, heads: Sequence[int] | None) -> list[int]:
        wanted = list(range(self.heads)) if heads is None else [int(head) for head in heads]
        wrong = [head for head in wanted if not 0 <= head < self.heads]
        if wrong or not wanted:
            raise ValueError(f"{self.site.path} has heads 0 to {self.heads - 1}; got {wrong or 'none'}")
        return wanted

    def blocks(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Iterator[slice]:
        """Slices of the rows whose weights for these heads stay small."""
        start, stop, _ = rows.indices(self.query.shape[2])
        line = self.query.shape[0] * (self.heads if heads is None else len(heads)) * self.key.shape[2]
        step = max(1, BLOCK_WEIGHTS // max(1, line))
        for first in range(start, stop, step):
            yield slice(first, min(stop, first + step))

    def mix(self, edit: Edit, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """The output [b, h, n, e] with edit(weights [b, heads, rows, m], rows) in the place of those heads' weights in
        those rows; all else as it is. A reader may return it. Made in blocks of rows, where no gradient has to keep
        them."""
        own, parts = self.check_heads(heads), []
        # Of all heads, those that share a key head stand in line as its queries: values are not repeated.
        value = self.value if heads is None else self.of_heads(self.value, own)
        for block in self.blocks(heads, rows):
            edited = self._told(edit(self.weights(heads, block), block), own, block).to(value.dtype)
            lines = edited.reshape(edited.shape[0], value.shape[1], -1, edited.shape[-1])
            parts.append((lines @ value).reshape(*edited.shape[:3], value.shape[-1]))
        return self._placed(parts, own, rows)

    def mix_rows(self, edit: Edit, batch: Sequence[int]) -> Tensor:
        """`mix` of some rows of the batch, [len(batch), h, n, e]; the others' weights are not made, unless somebody
        hears all of them."""
        if _hearers.get():
            return self._mix_whole(edit, batch)
        mask = self.mask
        mask = mask if mask is None or len(mask) == 1 else taken(mask, batch)
        query, key, value = (taken(rows, batch) for rows in (self.query, self.key, self.value))
        return AttentionCall(self.site, query, key, value, mask, self.causal, self.scoring).mix(edit)

    def _mix_whole(self, edit: Edit, batch: Sequence[int]) -> Tensor:
        chosen = torch.tensor(list(batch), device=self.query.device)

        def whole(weights: Tensor, rows: slice) -> Tensor:
            return weights.index_copy(0, chosen, edit(weights[chosen], rows))

        return self.mix(whole)[chosen]

    def _placed(self, parts: list[Tensor], heads: list[int], rows: slice) -> Tensor:
        """The output with these heads' new rows among their old ones."""
        start, stop, _ = rows.indices(self.query.shape[2])
        if not parts:
            return self.output
        if stop - start < self.query.shape[2]:
            own = self.output[:, heads]
            parts = [own[:, :, :start], *(part.to(own.dtype) for part in parts), own[:, :, stop:]]
        return self.replaced(torch.cat(parts, 2), heads)

    def _told(self, weights: Tensor, heads: list[int], rows: slice) -> Tensor:
        for hear in _hearers.get():
            hear(self, heads, rows, weights)
        return weights

    def biased(self, bias: Tensor) -> Tensor | None:
        """The output with bias [1 or b, 1 or h, 1, m] on the scores of the one query, by PyTorch's own kernel; None
        where there are more queries, which would need a matrix, where scores are capped or have sinks, and where
        somebody hears the weights, which are not made here."""
        if self.query.shape[2] > 1 or not self.scoring.plain or _hearers.get():
            return None
        mask = bias.to(self.query.dtype)
        if self.mask is not None:
            added = self.mask.is_floating_point()
            mask = mask + self.mask if added else torch.where(self.mask, mask, torch.finfo(mask.dtype).min)
        return scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=mask, scale=self.scale, enable_gqa=True
        )

    def rescored(self, change: Rescore, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """The output [b, h, n, e] with change(scores, rows) in the place of those heads' scores in those rows, which
        are cap(scale q k^T), float32 at least; all else as it is. A reader may return it, in training too: gradients
        reach queries, keys, values and whatever the change holds, and the layer's attention dropout is drawn. Masks and
        position biases come after the change. Where weights are no softmax of scores: ValueError."""
        own, parts = self.check_heads(heads), []
        for block in self.blocks(heads, rows):
            query, key, scoring, seen = self._select(own, block)
            scores = change(masked_scores(query, key, scoring, None).squeeze(2), block)
            weights = self._told(weigh(scores, seen, scoring.sinks), own, block)
            parts.append(self.weighted(weights, own))
        return self._placed(parts, own, rows)

    def weighted(self, weights: Tensor, heads: Sequence[int]) -> Tensor:
        """Weights [b, heads, rows, m], through the layer's attention dropout, times those heads' values."""
        weights = dropout(weights, self.dropout) if self.dropout else weights
        return weights.to(self.value.dtype) @ self.of_heads(self.value, heads)

    def visible(self, rows: slice = slice(None)) -> Tensor | None:
        """`allowed` as bool, True = may attend, whatever kind of mask the model has."""
        seen = self.allowed(rows)
        return seen if seen is None or seen.dtype == torch.bool else ~hides(seen)

    def replaced(self, output: Tensor, heads: Sequence[int] | Tensor) -> Tensor:
        """The call's output with these heads' [b, heads, n, e] in their place."""
        if len(heads) == self.heads and [int(head) for head in heads] == list(range(self.heads)):
            return output.to(self.value.dtype)  # the layer's own may not be made yet, and need not be
        chosen = torch.as_tensor(heads, device=output.device)
        return self.output.index_copy(1, chosen, output.to(self.output.dtype))

    def weight_gradients(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """d loss / d weights, [b, heads, rows, m] after a backward pass under record(gradients=True): no matrix was
        kept for it, since it is d loss / d output times the values."""
        chosen = torch.tensor(self.check_heads(heads), device=self.query.device)
        upstream = self.upstream().index_select(1, chosen)[:, :, rows]
        return upstream @ self.of_heads(self.value, chosen).detach().transpose(2, 3)

    def upstream(self) -> Tensor:
        """d loss / d output, [b, h, n, e]."""
        if not self.keeps_gradient or self.output.grad is None:
            raise ValueError(
                f"{self.site.path}: no gradient has reached this layer's output; use record(model, gradients=True) "
                "and call backward on a loss of the model's output"
            )
        return self.output.grad

    def check_values(self) -> None:
        """ValueError where heads give something else than the sum of values by weights."""

    def narrowed(self, stop: int) -> AttentionCall:
        """The call with its first `stop` keys alone, where its queries' weights do not ask for the others."""
        mask = None if self.mask is None else self.mask[..., :stop]
        key, value = self.key[:, :, :stop], self.value[:, :, :stop]
        return AttentionCall(self.site, self.query, key, value, mask, self.causal, self.scoring)


class MechanismCall:
    """One call of a manyheads mechanism that offers nothing from inside (it has no heads that sum values by weights, or
    does more with them): its inputs and its result [b, n, dim], weights on demand by `need_weights`."""

    shares = False

    def __init__(
        self,
        site: Site,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Result,
        memo: dict[str, Any] | None = None,
    ):
        self.site, self.args, self.kwargs, self.result = site, args, kwargs, result
        self.output = result.output
        self.keeps_gradient = False
        self.memo = {} if memo is None else memo
        self.heads: int = site.module.heads  # type: ignore[assignment]

    @property
    def layer(self) -> int:
        return self.site.layer

    def weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """[b, heads, rows, m]: the effective weights. A mechanism gives all of its matrix at once."""
        if self.result.weights is None:
            again: Result = self.site.module.forward(*self.args, **{**self.kwargs, "need_weights": True})
            self.result = self.result._replace(weights=again.weights)
        weights = self.result.weights
        if weights is None:
            raise ValueError(f"{self.site.path}: {type(self.site.module).__name__} has no weights for this call")
        weights = weights[:, :, rows]
        return weights if heads is None else weights[:, list(heads)]

    def blocks(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Iterator[slice]:
        yield rows


def runs(which: Sequence[int]) -> list[tuple[int, int]]:
    """Rows of a batch as runs of neighbours in order, (first, how many)."""
    found: list[tuple[int, int]] = []
    for row in which:
        if found and row == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((int(row), 1))
    return found


def taken(rows: Tensor, which: Sequence[int]) -> Tensor:
    """These rows, in order, a run of neighbours at a time; of one run a view, which copies nothing."""
    parts = [rows.narrow(0, first, count) for first, count in runs(which)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else rows[:0]


def opened(call: Any, who: str) -> AttentionCall:
    """The call, if it has queries, keys, values and head outputs; ValueError of `who` needs them if it does not."""
    if isinstance(call, AttentionCall):
        return call
    raise ValueError(
        f"{who}: {call.site.name} offers its weights and its output alone: it has no heads that are values summed by "
        "weights"
    )
