"""RazorAttention: retrieval heads keep everything, the others a summary of what they drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policies.streaming import recency
from manyheads.shrink.policy import Policy

# More than any head will hold.
EVERYTHING = 2**40
Table = Sequence[Sequence[float]]


@dataclass(kw_only=True)
class Razor(Policy):
    """Claim: heads that look back at a token's earlier copy, or at what followed it, must keep all; for the others the
    sinks, the recent tokens and one entry in the place of the rest are enough.

    The rest, N_d tokens, becomes one entry: mean key, mean value, weight N_d exp(q k), that is log N_d added to its
    score. Others keep sink_size + max(recent_floor, N / compression) + 1 entries of N tokens.
    echo, induction: [layers, query heads or KV heads], of which the highest shares over all layers are retrieval heads
    (a KV head counts as its best query head); or retrieval: (layer, KV head) pairs.
    compression_ratio instead: retrieval heads still keep all, the others what the ratio leaves them. budget_tokens:
    once not all tokens fit the others keep the least they may; retrieval heads share the rest, summarise their oldest.
    Source: arXiv 2407.15891, head search as in mindspore-ai/golden-stick. There the prompt alone is summarised; here
    decoded tokens join the mean as they leave. Layers with a sliding window drop without a summary.
    """

    compression_ratio: float | None = None
    echo: Table | None = None
    induction: Table | None = None
    retrieval: Sequence[tuple[int, int]] | None = None
    echo_share: float = 0.01
    induction_share: float = 0.14
    sink_size: int = 4
    recent_floor: int = 4000
    compression: float = 5.0
    weighted: ClassVar[bool] = True
    fuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        tables = {name: getattr(self, name) for name in ("echo", "induction") if getattr(self, name) is not None}
        if bool(tables) == (self.retrieval is not None):
            raise ValueError(
                "Razor: give the heads once, as a profile (echo, induction: tables [layers, heads]) or as retrieval "
                "(pairs of layer and KV head)"
            )
        for name, table in tables.items():
            _check_table(name, table)
        if len({(len(table), len(table[0])) for table in tables.values()}) > 1:
            raise ValueError("Razor: echo and induction are tables of different shapes; take both from one model")
        for name in ("echo_share", "induction_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Razor: {name} is a share of the heads, from 0 to 1; got {getattr(self, name)}")
        for name in ("sink_size", "recent_floor"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"Razor: {name} must be a whole number of at least 0; got {getattr(self, name)!r}")
        if not self.compression >= 1:
            raise ValueError(f"Razor: compression is N / recent tokens kept, at least 1; got {self.compression}")
        if self.allocation is not None:
            raise ValueError("Razor: which heads keep how much is the method itself; leave allocation out")
        if self.budget_bytes is not None:
            raise ValueError("Razor: heads that keep everything have no byte budget; give budget_tokens or nothing")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        # Sinks, the summary, and the latest token.
        return self.sink_size + 2

    @property
    def is_full(self) -> bool:
        return self.compression_ratio == 0

    def score(self, view: View) -> Tensor:
        latest = recency(view, self.sink_size)
        return latest.masked_fill(_summary(view), torch.inf) if view.memo else latest

    def mean_target(self, layer: Any, view: View) -> Tensor:
        if self.budget_tokens is not None:
            mean = super().mean_target(layer, view)
            return torch.where(view.fed.cpu() <= mean, EVERYTHING, mean)
        count = view.count.cpu().double()
        if self.compression_ratio is not None:
            return count
        recent = (count / self.compression + 1e-9).floor().clamp_min(self.recent_floor)
        return recent + self.sink_size + 1

    def targets(self, mean: Tensor, layer: Any, heads: int) -> Tensor:
        full = self.heads(layer.layers, heads)
        others, keep = mean, torch.full_like(mean, EVERYTHING)
        many, few = int(full.sum()), int((~full).sum())
        if self.compression_ratio is not None:
            left = full.numel() * (1 - self.compression_ratio) - many
            if left <= 0:
                raise ValueError(
                    f"Razor: compression_ratio={self.compression_ratio} leaves {1 - self.compression_ratio:.3g} of the "
                    f"cache, and the {many} retrieval heads of {full.numel()} keep more than that; name fewer of them"
                )
            others = (mean * left / max(1, few) + 1e-9).floor()
        if self.budget_tokens is not None:
            others = torch.where(mean < EVERYTHING, mean.clamp_max(self.sink_size + self.recent_floor + 1), mean)
            keep = (mean * full.numel() - others * few) / max(1, many)
        return torch.where(full[layer.index][None], keep[:, None], others[:, None]).long().clamp_min(self.smallest)

    def room(self, layer: Any) -> int | None:
        return None

    def heads(self, layers: int, kv_heads: int) -> Tensor:
        """[layers, KV heads] bool: the retrieval heads of a model of that shape."""
        full = torch.zeros(layers, kv_heads, dtype=torch.bool)
        for layer, head in self.retrieval or ():
            if not (0 <= layer < layers and 0 <= head < kv_heads):
                raise ValueError(
                    f"Razor: retrieval names layer {layer}, KV head {head}; the model has {layers} layers of "
                    f"{kv_heads} KV heads, counted from 0"
                )
            full[layer, head] = True
        for table, share in ((self.echo, self.echo_share), (self.induction, self.induction_share)):
            if table is not None:
                full |= _top(_per_kv_head(table, layers, kv_heads), share)
        return full

    def merge(self, view: View, keep: Tensor) -> Tensor:
        if view.window is not None:
            return keep
        gone = view.alive & ~keep
        full = gone.any(-1)
        if not bool(full.any()):
            return keep
        memo, heads = self._memo(view), view.group.index
        members = memo["members"].index_select(1, heads)
        # The oldest that is neither sink nor dropped makes room for the first summary, and is part of it.
        oldest = torch.where(keep & (view.positions >= self.sink_size), view.slots, 2**30).argmin(-1, keepdim=True)
        first = full & (members == 0)
        gone = gone.scatter(2, oldest, first[..., None] | gone.gather(2, oldest))
        slot = torch.where(first, view.slots.gather(2, oldest)[..., 0], memo["slot"].index_select(1, heads))
        added = gone.to(members.dtype)
        total = members + added.sum(-1)
        sums = {name: memo[name].index_select(1, heads) for name in ("keys", "values")}
        for name, held in (("keys", view.keys), ("values", view.values)):
            sums[name] = sums[name] + (added[:, :, None] @ held.to(added.dtype))[:, :, 0]
        new = {**sums, "members": total, "slot": slot}
        for name, own in new.items():
            memo[name].index_copy_(1, heads, own)
        self._write(view, full, slot, sums, total)
        return keep

    def _write(self, view: View, full: Tensor, slot: Tensor, sums: dict[str, Tensor], total: Tensor) -> None:
        """The summaries into their places; rows and heads that have none get their first entry as it is."""
        at = torch.where(full[..., None], view.slots == slot[..., None], False).byte().argmax(-1, keepdim=True)
        rows = {"bias": torch.where(full, total.log(), view.note("bias").gather(2, at)[..., 0])[..., None]}
        for name, held in (("keys", view.keys), ("values", view.values)):
            here = held.gather(2, at[..., None].expand(-1, -1, -1, held.shape[-1]))
            mean = (sums[name] / total.clamp_min(1)[..., None]).to(held.dtype)
            rows[name] = torch.where(full[..., None, None], mean[:, :, None], here)
        view.put(at, **rows)

    def _memo(self, view: View) -> dict[str, Tensor]:
        """Sums over the dropped tokens [b, H, d], in float32 at least, how many they are, and the summary's slot."""
        if not view.memo:
            b, heads = view.keys.shape[0], view.passes[-1].queries.shape[1]
            wide = torch.promote_types(view.keys.dtype, torch.float32)
            for name, held in (("keys", view.keys), ("values", view.values)):
                view.memo[name] = held.new_zeros((b, heads, held.shape[-1]), dtype=wide)
            view.memo["members"] = view.keys.new_zeros((b, heads), dtype=wide)
            view.memo["slot"] = view.slots.new_full((b, heads), -1)
        return view.memo


def _summary(view: View) -> Tensor:
    """[b, g, m]: whether an entry is its head's summary."""
    own = {name: view.memo[name].index_select(1, view.group.index) for name in ("slot", "members")}
    return (view.slots == own["slot"][..., None]) & (own["members"] > 0)[..., None]


def _check_table(name: str, table: Table) -> None:
    if not len(table) or len({len(row) for row in table}) != 1 or not len(table[0]):
        raise ValueError(f"Razor: {name} must be a table [layers, heads] with rows of one length")
    if not all(math.isfinite(value) for row in table for value in row):
        raise ValueError(f"Razor: {name} holds numbers that are not finite; measure the heads again")


def _per_kv_head(table: Table, layers: int, kv_heads: int) -> Tensor:
    own = torch.tensor([list(row) for row in table], dtype=torch.float64)
    if own.shape[0] != layers or own.shape[1] % kv_heads:
        raise ValueError(
            f"Razor: the profile is of {tuple(own.shape)} (layers, heads), the model has {layers} layers of {kv_heads} "
            "KV heads; use a profile of this model"
        )
    return own.unflatten(1, (kv_heads, -1)).amax(-1)


def _top(scores: Tensor, share: float) -> Tensor:
    """The highest share of all, rounded up; ties by order."""
    count = math.ceil(share * scores.numel() - 1e-9)
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order, True).view(scores.shape)
