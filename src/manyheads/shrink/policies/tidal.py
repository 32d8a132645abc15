"""TidalDecode: one layer chooses what the next ones read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.hosts.attend import Mask, Scoring, lies_by_feature, masked_attention, probabilities, two_products
from manyheads.hosts.visibility import Visibility
from manyheads.shrink.group import Group
from manyheads.shrink.policy import Policy

# Copying what each query head chose writes and reads it once more, and query heads of one KV head choose apart: below
# so many entries for each that they choose together, reading all of them under a mask is less work.
COPIED = 2


@dataclass(kw_only=True)
class TidalDecode(Policy):
    """Claim: neighbouring layers look at the same tokens, so one layer can choose for those above it.

    While decoding: layers below sparse_layer_start read everything. That layer and correction_layer read everything
    too and note, for every query head h of its own, P_h = the budget_tokens positions of highest logit q_h k_t scale,
    [b, h, k]; each other layer's head h attends to the latest P_h alone. Prompts are read in full. Nothing is dropped:
    the cache holds all, `entries_read` tells the part. top_k: the paper's name for budget_tokens.
    Source: arXiv 2410.05076, DerrickYLJ/TidalDecode `modify_llama.py`, whose correction_layer is 13 for Llama-3-8B and
    9 for Llama-2-7B; none unless given. There every pass after the first is sparse; here passes of several tokens are
    prompts, except candidates that may be taken back. Layers with a sliding window read their window; the two that
    choose must have none.
    """

    budget_tokens: int | None = None
    top_k: int | None = None
    sparse_layer_start: int = 2
    correction_layer: int | None = None
    reads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.top_k is not None:
            if self.budget_tokens is not None and self.budget_tokens != self.top_k:
                raise ValueError(
                    f"TidalDecode: top_k={self.top_k} and budget_tokens={self.budget_tokens} say the same thing twice, "
                    "and differently; give one of them"
                )
            if not isinstance(self.top_k, int) or self.top_k < 1:
                raise ValueError(f"TidalDecode: top_k must be a whole number of at least 1; got {self.top_k!r}")
            self.budget_tokens = self.top_k
        start, correction = self.sparse_layer_start, self.correction_layer
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"TidalDecode: sparse_layer_start is a layer's index, from 0; got {start!r}")
        if correction is not None and (not isinstance(correction, int) or correction <= start):
            raise ValueError(
                f"TidalDecode: correction_layer is a layer above sparse_layer_start={start}, or None; "
                f"got {correction!r}"
            )
        super().__post_init__()

    def prepare(self, model: Any, cache: Any) -> None:
        layers = cache.layers
        for name in ("sparse_layer_start", "correction_layer"):
            at = getattr(self, name)
            if at is not None and at >= len(layers) - 1:
                raise ValueError(
                    f"TidalDecode: {name}={at} chooses for the layers above it, and the model's last is "
                    f"{len(layers) - 1}; give at most {len(layers) - 2}"
                )
            if at is not None and layers[at].window is not None:
                full = [layer.index for layer in layers if layer.window is None]
                raise ValueError(
                    f"TidalDecode: layer {at} ({name}) sees a window of {layers[at].window} tokens and cannot choose "
                    f"for others; layers without a window: {full or 'none'}"
                )

    def read(self, layer: Any, queries: Tensor, group: Group, scoring: Scoring, seen: Visibility) -> Tensor | None:
        count = self.budget_tokens
        if count is None or layer.index < self.sparse_layer_start or layer.window is not None:
            return None
        if group.length <= count or not layer.decodes(queries.shape[3], seen.offset):
            return None
        shared = layer.shared
        if layer.index in (self.sparse_layer_start, self.correction_layer):
            with torch.no_grad():
                shared["slots"] = best_slots(queries, group, scoring, seen, count)
            return None
        slots: Tensor = shared["slots"].to(queries.device)
        layer.read = count
        out = attend_to(queries, group, slots, scoring, seen, shared)
        if layer.index == layer.layers - 1:
            shared.clear()
        return out


def best_slots(queries: Tensor, group: Group, scoring: Scoring, seen: Visibility, count: int) -> Tensor:
    """[b, h, n, count]: the slots of highest logit for every query head and query, and any others where it
    sees fewer: who reads them masks them again."""
    b, g, _, n, _ = queries.shape
    keys, slots, found = group.view("keys"), group.slots(), []
    for i in range(n):
        # float32 at least: in half precision many logits of a long context are equal.
        scores = (queries[:, :, :, i] @ keys.transpose(2, 3)).to(torch.promote_types(keys.dtype, torch.float32))
        scores = scores * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if n > 1 or not _sees_all(seen):
            mask = seen.allowed(slice(i, i + 1), slots)
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
        places = scores.topk(min(count, group.length), dim=-1).indices
        best = slots.expand(b, g, -1).long().gather(2, places.flatten(2))
        found.append(best.view(places.shape).flatten(1, 2))
    return torch.stack(found, 2)


def attend_to(
    queries: Tensor,
    group: Group,
    slots: Tensor,
    scoring: Scoring,
    seen: Visibility,
    shared: dict[str, Any] | None = None,
) -> Tensor:
    """Attention [b, g, r, n, dv] of every query to its own slots [b, h, n, k], of counted slots. shared: what layers
    that are given the same slots may hand on to each other."""
    assert group.first is not None
    g, r, n = queries.shape[1:4]
    if scoring.sinks is None and group.length <= COPIED * r * slots.shape[3]:
        alike = n == 1 and scoring.plain and _sees_all(seen) and group.filled and group.codec is None
        if alike and shared is not None and lies_by_feature(group.rows["keys"]):
            return _alike(queries, group, slots, scoring, shared)
        return _under_mask(queries, group, slots, scoring, seen)
    keys, values, rows = group.view("keys"), group.view("values"), []
    for i in range(n):
        own = slots[:, :, i]
        places = (own - group.first).clamp_min(0)
        # Every query head now has keys of its own: heads stand as groups of one.
        line = queries[:, :, :, i : i + 1].flatten(1, 2).unsqueeze(2)
        mask = None if n == 1 and _sees_all(seen) else seen.allowed(slice(i, i + 1), own)
        out = []
        for here, heads in head_blocks(g, r, queries.device):
            sinks = None if scoring.sinks is None else scoring.sinks[heads]
            part = Scoring(scoring.scale, scoring.softcap, sinks)
            at, seen_here = places[:, heads], None if mask is None else mask[:, heads]
            picked = take(keys[:, here], at), take(values[:, here], at)
            out.append(masked_attention(line[:, heads], *picked, part, _always(seen_here)))
        rows.append(torch.cat(out, 1))
    return torch.cat(rows, 3).view(*queries.shape[:4], -1)


def _alike(queries: Tensor, group: Group, slots: Tensor, scoring: Scoring, shared: dict[str, Any]) -> Tensor:
    """The same of a single query, under a mask that is made once for all layers that read the same slots."""
    b, g, r = queries.shape[:3]
    made, moment = shared.get("mask"), (group.first, group.length)
    if made is None or made[0] is not slots or made[1] != moment:
        mask = queries.new_full((b * g, r, group.length + 1), -torch.inf)
        # Slots that are no longer held fall on a place of their own.
        places = (slots - (group.first or 0) + 1).clamp_min(0).view(b * g, r, -1)
        mask = mask.scatter_(2, places, 0.0)[..., 1:]
        shared["mask"] = made = slots, moment, mask
    return two_products(queries, *group.matrices(), scoring.scale, made[2])[0]


def _under_mask(queries: Tensor, group: Group, slots: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
    """The same, reading all entries once for the query heads that share them."""
    b, g, r, n, d = queries.shape
    first = group.first or 0
    chosen = torch.zeros((b, g * r, n, group.length + 1), dtype=torch.bool, device=queries.device)
    # Slots that are no longer held fall on a place of their own.
    chosen = chosen.scatter_(3, (slots - first + 1).clamp_min(0), True)[..., 1:]
    if n > 1 or not _sees_all(seen):
        allowed = seen.allowed(slice(0, n), group.slots())
        if allowed.dtype == torch.bool:
            chosen = chosen & allowed
        else:
            chosen = allowed.masked_fill(~chosen, torch.finfo(allowed.dtype).min)
    # Query heads stand in line as queries of their KV head.
    line = queries.reshape(b, g, 1, r * n, d)
    weights = probabilities(line, group.view("keys"), scoring, chosen.reshape(b, g, r * n, group.length))
    values = group.view("values")
    return (weights[:, :, 0].to(values.dtype) @ values).view(b, g, r, n, -1)


def head_blocks(g: int, r: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """KV heads and their query heads whose entries are read together: one on a CPU, where what was picked then stays
    in the core's cache (measured: four times faster at 1,024 entries), all elsewhere."""
    step = 1 if device.type == "cpu" else g
    for first in range(0, g, step):
        yield slice(first, first + step), slice(first * r, (first + step) * r)


def take(rows: Tensor, places: Tensor) -> Tensor:
    """rows [b, g, m, d] at places [b, g * r, ...], query head i from KV head i // r: [b, g * r, ..., d].

    Whole rows of one flat table are copied, 20 times faster on a CPU than `gather` of their elements."""
    b, g, _, d = rows.shape
    if rows.stride(3) != 1 or any(step % d for step in rows.stride()[:3]):
        rows = rows.contiguous()
    steps = [step // d for step in rows.stride()[:3]]
    last = sum((size - 1) * step for size, step in zip(rows.shape[:3], steps, strict=True))
    table = rows.as_strided((last + 1, d), (d, 1))
    heads = torch.arange(g, device=rows.device).repeat_interleave(places.shape[1] // g)
    start = torch.arange(b, device=rows.device)[:, None] * steps[0] + heads * steps[1]
    at = places * steps[2] + start.view(*start.shape, *(1,) * (places.dim() - 2))
    return table.index_select(0, at.flatten()).view(*places.shape, d)


def _sees_all(seen: Visibility) -> bool:
    """Whether the last token of a pass sees all tokens, where there is no window."""
    return seen.plain and seen.padding is None


def _always(mask: Tensor | None) -> Mask:
    return lambda rows: mask
