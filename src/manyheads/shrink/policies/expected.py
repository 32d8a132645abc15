"""Expected attention: what queries yet to come will look at, from those that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.functional.rotary import turn
from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class ExpectedAttention(Policy):
    """Claim: queries before rotation are close to Gaussian, so what a key will get from future ones has a closed form.

    With mean m and covariance S of a head's queries so far (the first sink_size left out), both turned by the mean
    rotation R over the next n_future_positions: score(t) = softmax_t(s k_t^T R m + s^2 k_t^T R S R^T k_t / 2), s the
    layer's scale, mean over a KV head's query heads, times ||v_t||, [b, g, m]. Sinks stay.
    Source: arXiv 2510.00636, NVIDIA/kvpress `expected_attention_press.py`, there at prefill only; here decoded queries
    join the statistics. Queries are turned back from their positions; soft caps on scores are left out of the estimate.
    rotary=False takes queries as they are, for models without rotary positions.
    """

    # A bunch of queries joins the statistics, and a bunch of entries is scored, in the time of one.
    interval: int = 16
    n_future_positions: int = 512
    sink_size: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0
    rotary: bool = True

    def __post_init__(self) -> None:
        name = "ExpectedAttention"
        if not isinstance(self.n_future_positions, int) or self.n_future_positions < 1:
            raise ValueError(
                f"{name}: n_future_positions must be a whole number of at least 1; got {self.n_future_positions!r}"
            )
        if not isinstance(self.sink_size, int) or self.sink_size < 0:
            raise ValueError(f"{name}: sink_size must be a whole number of at least 0; got {self.sink_size!r}")
        if not self.epsilon >= 0:
            raise ValueError(f"{name}: epsilon is added to a share of attention, at least 0; got {self.epsilon}")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    def prepare(self, model: Any, cache: Any) -> None:
        if self.is_full or not self.rotary:
            return
        from manyheads.hosts.families import rotations

        try:
            found = rotations(model)
        except ValueError as error:
            reason = str(error).split(";")[0]
            raise ValueError(
                f"ExpectedAttention cannot turn queries back: {reason}; rotary=False takes them as they are"
            ) from error
        for layer, angles in zip(cache.layers, found, strict=True):
            layer.angles = angles

    def observe(self, view: View) -> None:
        """Counts, means and scatter of all queries so far, of all heads at once. Decoded ones wait until they are
        `interval`, or are asked for: so many take no longer than one."""
        if view.place:
            return
        memo = view.memo
        for done in view.passes:
            if not memo:
                memo |= self._nothing(done.queries)
            count, offset = done.queries.shape[3], done.seen.offset
            held = [memo.pop("waiting")] if "waiting" in memo else []
            waiting = torch.cat([*held, done.queries], 3)
            if count == 1 and waiting.shape[3] < self.interval:
                memo["waiting"] = waiting
            else:
                self._join(view, waiting, offset + count)

    def _nothing(self, queries: Tensor) -> dict[str, Tensor]:
        b, heads, repeat, _, d = queries.shape
        wide = torch.promote_types(queries.dtype, torch.float32)
        none = {
            "asked": queries.new_zeros((b, heads), dtype=wide),
            "mean": queries.new_zeros((b, heads, repeat, d), dtype=wide),
        }
        if self.use_covariance:
            none["scatter"] = queries.new_zeros((b, heads, repeat, d, d), dtype=wide)
        return none

    def _join(self, view: View, queries: Tensor, end: int) -> None:
        """Adds the queries [b, H, r, n, d] of the n tokens before slot `end`, turned back to before rotation."""
        memo, padding = view.memo, view.passes[-1].seen.padding
        slots = torch.arange(end - queries.shape[3], end, device=queries.device)
        positions, real = slots[None], torch.ones_like(slots, dtype=torch.bool)[None]
        if padding is not None:
            positions, real = (padding.long().cumsum(1) - 1)[:, slots], padding[:, slots]
        queries = queries.to(memo["mean"].dtype)
        if view.angles is not None:
            queries = turn(queries, -positions[:, None, None], view.angles.to(queries.device))
        memo |= _joined(memo, queries, real & (positions >= self.sink_size))

    def score(self, view: View) -> Tensor:
        if "waiting" in view.memo:
            last = view.passes[-1]
            self._join(view, view.memo.pop("waiting"), last.seen.offset + last.queries.shape[3])
        memo, index, scale = view.memo, view.group.index, view.passes[-1].scoring.scale
        asked = memo["asked"].index_select(1, index).clamp_min(1)
        mean = memo["mean"].index_select(1, index)
        keys, score = view.keys.to(mean.dtype), torch.zeros_like(view.keys[..., 0], dtype=mean.dtype)
        counted = view.alive & (view.positions >= self.sink_size)
        for i in range(mean.shape[2]):
            turned = self._ahead(view, mean[:, :, i, None])[:, :, 0]
            logit = (keys @ turned[..., None])[..., 0] * scale
            if self.use_covariance:
                spread = memo["scatter"].index_select(1, index)[:, :, i] / asked[..., None, None]
                spread = self._ahead(view, self._ahead(view, spread).transpose(-1, -2))
                logit = logit + (keys @ spread * keys).sum(-1) * (scale * scale / 2)
            score += logit.masked_fill(~counted, -torch.inf).softmax(-1).nan_to_num(0.0) / mean.shape[2]
        if self.use_vnorm:
            score = (score + self.epsilon) * view.values.to(score.dtype).norm(dim=-1)
        return score.masked_fill(view.positions < self.sink_size, torch.inf)

    def _ahead(self, view: View, rows: Tensor) -> Tensor:
        """Rows [b, g, x, d] turned by the mean rotation over the positions that come next."""
        if view.angles is None:
            return rows
        later = torch.arange(self.n_future_positions, device=rows.device)
        angle = (view.count[:, None] + later)[..., None] * view.angles.to(rows.device)
        cos, sin = (own.mean(1)[:, None, None].to(rows.dtype) for own in (angle.cos(), angle.sin()))
        half = cos.shape[-1]
        left, right, rest = rows.split([half, half, rows.shape[-1] - 2 * half], -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)


def _joined(before: dict[str, Tensor], queries: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """The statistics of two sets of queries from those of each: sums about the mean, which lose no digits."""
    weight = counted.to(queries.dtype).expand(queries.shape[0], -1)
    new = weight.sum(-1)[:, None].expand_as(before["asked"])
    mean = (queries * weight[:, None, None, :, None]).sum(3) / new.clamp_min(1)[..., None, None]
    total = before["asked"] + new
    step = mean - before["mean"]
    share = (new / total.clamp_min(1))[..., None, None]
    after = {"asked": total, "mean": before["mean"] + step * share}
    if "scatter" in before:
        own = (queries - mean[:, :, :, None]) * weight[:, None, None, :, None]
        pull = (before["asked"] * new / total.clamp_min(1))[..., None, None, None]
        after["scatter"] = before["scatter"] + own.transpose(-1, -2) @ own + pull * step[..., None] * step[..., None, :]
    return after
