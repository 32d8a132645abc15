"""Key-driven grouped-query attention: KDGQA, DGQA and PGQA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.deferred import Deferred, recomputing
from manyheads.functional.grouped import grouped_mix, grouped_scores
from manyheads.functional.linear import hide, widen
from manyheads.functional.passes import attend_where
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where

SOURCE = "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention"


def key_norms(k: Tensor, padding: Tensor | None) -> Tensor:
    """k [b, g, m, d] -> Frobenius norm of each head's real keys [b, g], without gradient."""
    return torch.linalg.vector_norm(widen(hide(k.detach(), padding)), dim=(-2, -1))


def stretched(norms: Tensor) -> Tensor:
    """Norms [..., g] between 0 (the least) and 1 (the largest); all one where they are equal."""
    low, high = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
    return torch.where(high > low, (norms - low) / (high - low).clamp(min=torch.finfo(norms.dtype).tiny), 1.0)


def allot(shares: Tensor, heads: int) -> Tensor:
    """shares [..., g], not negative -> whole numbers [..., g] in proportion, that sum to `heads`.

    Rounded half to even; then the largest gives, or the smallest gets, one at a time until the sum is right.
    """
    groups = shares.shape[-1]
    total = shares.sum(-1, keepdim=True)
    even = torch.full_like(shares, 1 / groups)
    counts = (heads * torch.where(total > 0, shares / total.clamp(min=torch.finfo(shares.dtype).tiny), even)).round()
    order = torch.arange(groups, device=shares.device)
    # Each of g numbers is off by at most a half, so that g steps are enough.
    for _ in range(groups):
        surplus = counts.sum(-1, keepdim=True) - heads
        down = (order == counts.argmax(-1, keepdim=True)) & (surplus > 0)
        up = (order == counts.argmin(-1, keepdim=True)) & (surplus < 0)
        counts = counts - down.to(counts.dtype) + up.to(counts.dtype)
    return counts.long()


def owners(counts: Tensor, heads: int) -> Tensor:
    """counts [..., g] -> which key head each query head reads, [..., heads]: neighbours share one."""
    ends = counts.cumsum(-1)[..., None, :]
    return (torch.arange(heads, device=counts.device)[:, None] >= ends).sum(-1)


@register
class KDGQA(SoftmaxAttention):
    """Key/value heads with larger keys serve more query heads, decided anew for every sequence.

        n_g = ||K_g||_F,  s_g = (n_g - min n) / (max n - min n),  key head g serves round(heads s_g / sum s) query heads

    The numbers are then changed by ones, the largest down or the smallest up, until they sum to `heads`; query heads
    are handed out in order. The weakest key head may serve none. No gradient passes through the choice.
    Source: Khan et al., arXiv:2408.08454, and its code, but: the code sums norms over the batch, so that a row depends
    on its neighbours, where here each row decides for itself; equal norms, there 0 / 0, share evenly; padding is not in
    the norms. No causal form: the norms are those of all keys, later ones too (DGQA has one).
    Weights: the code's proj has a bias whether or not q, k, v have.
    """

    card = Card(
        name="kdgqa",
        title=f"{SOURCE} (KDGQA)",
        reference="arXiv:2408.08454",
        family=Family.MIXING,
        patterns={"noncausal-self", "noncausal-cross"},
        time="n^2",
        state="",
        decodes=False,
        example={"kv_heads": 2},
        notes="no causal form: the norms of all keys decide who reads which",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=_kv_heads(heads, kv_heads), bias=bias, rotary=rotary)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, where = self._read(x, context, call)
        counts = allot(stretched(key_norms(k, where.padding)), self.heads)
        index = owners(counts, self.heads)[:, :, None, None]
        k, v = (t.gather(1, index.expand(-1, -1, *t.shape[2:])) for t in (k, v))
        mixed, weights = attend_where(q, k, v, where, scale=self.scale, need_weights=call.need_weights)
        if context is not None:
            mixed = mixed + (q * 0).sum(-1, keepdim=True)  # a query of NaN stays one, whatever the kernel makes of it
        output, _ = self.output(mixed, x, call)
        return Result(output, weights)


@register
class DGQA(SoftmaxAttention):
    """Grouped queries whose groups follow the norms of the keys while the model is trained, and are fixed after it.

        every `window` training passes, with n_g the mean of ||K_g||_F over the batch and c_g the cache:
        rule "ema": c = 0.9 n + 0.1 c, shares c as they are;  rule "diff": shares |c - n|, then c = n

    allocation: query heads per key head to start with, by default even; afterwards the buffer `counts` [kv_heads].
    Source: Khan et al., arXiv:2408.08454, and its code, but: the code's cache is (c + n) / window in training and n in
    evaluation, whatever the rule; here it is the paper's average, or n. The sum is mended as in KDGQA, not at random.
    Groups change in training alone (the code's also in evaluation), as the first training pass after a backward begins,
    by the mean n of those due, so that no output depends on later tokens or on the batch. No padding in the norms.
    Weights: the code's proj has a bias whether or not q, k, v have; its splits, not saved there, are counts.
    """

    card = Card(
        name="dgqa",
        title=f"{SOURCE} (DGQA)",
        reference="arXiv:2408.08454",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"},
        time="n^2",
        state="n kv_heads / heads",
        example={"kv_heads": 2, "allocation": [3, 1]},
    )
    counts: Tensor
    cache: Tensor
    passes: Tensor
    norms: Tensor
    gathered: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        rule: str = "ema",
        window: int = 300,
        allocation: Sequence[int] | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=_kv_heads(heads, kv_heads), bias=bias, rotary=rotary)
        groups = self.kv_heads
        if rule not in ("ema", "diff") or window < 1:
            raise ValueError(f"dgqa: rule={rule!r}, window={window}; want 'ema' or 'diff', and a window of at least 1")
        given = [heads // groups] * groups if allocation is None else list(allocation)
        if len(given) != groups or sum(given) != heads or min(given) < 0:
            raise ValueError(
                f"dgqa: allocation={allocation}; want kv_heads={groups} numbers, none negative, whose sum is {heads}"
            )
        self.rule, self.window = rule, window
        self.register_buffer("counts", torch.tensor(given))
        self.register_buffer("cache", torch.zeros(groups))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("norms", torch.zeros(groups))
        self.register_buffer("gathered", torch.zeros((), dtype=torch.long))
        self.deferred = Deferred()

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        return grouped_scores(q * self.scale, self._served(k))

    def mix(self, weights: Tensor, v: Tensor, where: Where) -> Tensor:
        return grouped_mix(weights, self._served(v))

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        """One pass per key head, for the query heads that it serves: keys and values are not copied to each of them."""
        parts, first = [], 0
        for group, count in enumerate(self.counts.tolist()):
            if not count:
                continue
            served, own = slice(first, first + count), slice(group, group + 1)
            whose = where
            if where.dense is not None and where.dense.shape[1] > 1:
                whose = replace(where, dense=where.dense[:, served])
            parts.append(attend_where(q[:, served], k[:, own], v[:, own], whose, scale=self.scale)[0])
            first += count
        return torch.cat(parts, 1)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        learns = self.training and call.state is None
        if learns and self.deferred.due():
            self._regroup()
        result = super().attend(x, context, call)
        if learns and not recomputing():
            self._gather(x if context is None else context, call.padding)
            self.deferred.watch(result.output)
        return result

    def _served(self, rows: Tensor) -> Tensor:
        """[b, g, m, d] -> [b, h, m, d]."""
        return rows.index_select(1, owners(self.counts, self.heads))

    @torch.no_grad()
    def _gather(self, source: Tensor, padding: Tensor | None) -> None:
        self.passes += 1
        if int(self.passes) % self.window:
            return
        # Turning by position keeps norms, so that keys are wanted before it.
        k = self.k_proj(source).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        self.gathered += 1
        self.norms.lerp_(key_norms(k, padding).mean(0).to(self.norms.dtype), 1 / int(self.gathered))

    @torch.no_grad()
    def _regroup(self) -> None:
        if not self.gathered:
            return
        if self.rule == "ema":
            self.cache.copy_(0.9 * self.norms + 0.1 * self.cache)
            shares = self.cache
        else:
            shares = (self.cache - self.norms).abs()
            self.cache.copy_(self.norms)
        self.counts.copy_(allot(shares, self.heads))
        self.norms.zero_()
        self.gathered.zero_()


@register
class PGQA(SoftmaxAttention):
    """Grouped queries with noise subtracted from what the heads found, so that heads of a group grow apart.

        O_h <- O_h - P_h in training,  O_h: head h's output as one row of n d numbers,  P: uniform noise [heads, n d]
        with zeros at (h, h), each row then brought to the mean and the standard deviation of O_h

    In evaluation it is GQA. No causal form: the mean and deviation are taken over all tokens.
    Source: Khan et al., arXiv:2408.08454, which speaks of Gaussian noise on attention maps; its code does the above, in
    evaluation too, where its results are random. Padding is neither counted nor changed.
    """

    card = Card(
        name="pgqa",
        title=f"{SOURCE} (PGQA)",
        reference="arXiv:2408.08454",
        family=Family.MIXING,
        patterns={"noncausal-self", "noncausal-cross"},
        time="n^2",
        state="",
        decodes=False,
        example={"kv_heads": 2},
        notes="no causal form: the noise in training has the mean and deviation of all tokens",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=_kv_heads(heads, kv_heads), bias=bias, rotary=rotary)

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.training:
            mixed = mixed - _noise_like(mixed.detach(), None if call.pattern.cross else call.padding)
        return super().output(mixed, x, call)


def _noise_like(mixed: Tensor, real: Tensor | None) -> Tensor:
    """mixed [b, h, n, d] -> noise of the mean and deviation of each row and head, zero where real [b, n] is not."""
    noise = torch.rand_like(mixed).flatten(2)
    noise = noise * (1 - torch.eye(*noise.shape[1:], dtype=noise.dtype, device=noise.device))
    kept = torch.ones_like(mixed) if real is None else real[:, None, :, None].to(mixed.dtype).expand_as(mixed)
    kept = kept.flatten(2)
    (mean, deviation), (own_mean, own_deviation) = _moments(mixed.flatten(2), kept), _moments(noise, kept)
    return ((noise - own_mean) / own_deviation.clamp(min=1e-12) * deviation + mean).mul(kept).view_as(mixed)


def _moments(rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    mean = (rows * kept).sum(-1, keepdim=True) / count
    return mean, (((rows - mean) * kept).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _kv_heads(heads: int, given: int | None) -> int:
    """By default the largest divisor of heads that is at most heads / 2."""
    return max((g for g in range(1, heads // 2 + 1) if heads % g == 0), default=1) if given is None else given
