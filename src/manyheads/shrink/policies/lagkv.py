"""LagKV: tokens that stand out against the stretch of text that follows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import TextOrder, one_text, whole_number, wide


@dataclass(kw_only=True)
class LagKV(Policy):
    """Claim: how unevenly a token's features lie within the range that the next stretch of text spans tells its worth,
    with no attention weights.

    After sink_size tokens the entries fall into stretches of lag_size. With lo, hi the least and the greatest key
    feature of the next stretch: s_K(t) = softmax over t's stretch of std_features((k_t - lo) / (hi - lo)), s_V alike;
    score(t) = rank of s_K + s_V within its stretch, [b, g, m]. Sinks, the last full stretch and what follows it stay;
    a prompt without two stretches keeps sinks and the latest. cross_scoring=True compares s_K + s_V itself.
    Source: arXiv 2504.04704, AI-Lab-China-Merchants-Bank/LagKV; the budget is counted as NVIDIA/kvpress
    `lagkv_press.py` does, over the whole prompt (the paper: over the scored stretches). Where a feature does not vary
    within a stretch it is divided by 1 instead of 0; equal ranks go to the later stretch.
    """

    sink_size: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        whole_number("LagKV", "sink_size", self.sink_size, 0)
        whole_number("LagKV", "lag_size", self.lag_size, 1)
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    def score(self, view: View) -> Tensor:
        one_text(view, "LagKV")
        text = TextOrder.of(view)
        # How many stretches of each head are scored: all full ones but the last.
        scored = ((text.count - self.sink_size) // self.lag_size - 1).clamp_min(0)
        most = int(scored.max())
        # The latest above all that is scored, and sinks above them.
        score = (text.rank + text.rank.shape[-1] * (self.lag_size + 1)).double()
        if most:
            score = text.sort(score)
            here = slice(self.sink_size, self.sink_size + most * self.lag_size)
            made = self._stretches(text, view, most).flatten(2)
            inside = torch.arange(made.shape[2], device=made.device) < scored[..., None] * self.lag_size
            score[..., here] = torch.where(inside, made, score[..., here])
            score = text.unsort(score)
        return score.masked_fill(text.rank < self.sink_size, torch.inf)

    def _stretches(self, text: TextOrder, view: View, most: int) -> Tensor:
        """[b, g, stretches, lag_size]: scores in the order of the text."""
        apart = sum(_apart(self._cut(text, rows, most + 1)) for rows in (view.keys, view.values))
        assert isinstance(apart, Tensor)
        if self.cross_scoring:
            return apart
        ranks = apart.argsort(-1).argsort(-1).double()
        return ranks * text.rank.shape[-1] + torch.arange(most, device=ranks.device)[:, None]

    def _cut(self, text: TextOrder, rows: Tensor, stretches: int) -> Tensor:
        """[b, g, stretches, lag_size, d] after the sinks; heads that hold less are filled up."""
        rows = wide(text.sort(rows))[:, :, self.sink_size : self.sink_size + stretches * self.lag_size]
        rows = pad(rows, (0, 0, 0, stretches * self.lag_size - rows.shape[2]))
        return rows.unflatten(2, (stretches, self.lag_size))


def _apart(rows: Tensor) -> Tensor:
    """Of all stretches but the last, against the next."""
    low, high = rows[:, :, 1:].amin(3, keepdim=True), rows[:, :, 1:].amax(3, keepdim=True)
    span = high - low
    placed = (rows[:, :, :-1] - low) / torch.where(span > 0, span, 1)
    return placed.std(-1).softmax(-1).double()
