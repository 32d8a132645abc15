"""LongHeads: every head reads the chunks that it finds most relevant, at positions that the model knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from manyheads.functional.rotary import turn
from manyheads.hosts.attend import Scoring
from manyheads.hosts.visibility import Visibility
from manyheads.shrink.group import Group
from manyheads.shrink.policies.tidal import head_blocks, take
from manyheads.shrink.policy import Policy

# Tokens that may be taken back (assisted decoding) without losing a query that a chunk still needs.
TRIAL = 64
# Numbers in the keys that one block of queries reads: 2^24 float32 numbers are 64 MiB.
BLOCK_READ = 2**24


@dataclass(kw_only=True)
class LongHeads(Policy):
    """Claim: each head needs few chunks of a long text; read at positions 0 .. L - 1 they stay what it was trained on.

    A token at position p >= begin_selective_length (default: budget_tokens, L) reads, per KV head, the first chunk of
    chunk_size tokens, its own, the one before, and those of highest sum_r q_r c, L / chunk_size in all; others read
    all. c_v = mean over tokens and query heads of the chunk's own attention, no mask; c = softmax(c_v K^T scale) K,
    [b, g, chunks, d], with keys turned to positions within their chunk, q not turned, neither caps nor sinks. Chunks
    read are moved together: each query is turned per chunk, which gives the distances of keys at 0 .. L - 1.
    Source: arXiv 2402.10685, LuLuLuyi/LongHeads `modeling_llama.py`, whose decode path has no previous chunk when a
    token ends its own, and whose prompt path leaves out the token itself; here both are read, by prompts (in blocks of
    queries) as by single tokens. There each query head chooses, here a KV head for all of its own, which is the same
    where no keys are shared. Layers with a sliding window read their window. Padding must stand left of the text.
    """

    budget_tokens: int | None = None
    chunk_size: int = 256
    begin_selective_length: int | None = None
    reads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        size, begin = self.chunk_size, self.begin_selective_length
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"LongHeads: chunk_size must be a whole number of at least 1; got {size!r}")
        if begin is not None and (not isinstance(begin, int) or begin < 0):
            raise ValueError(f"LongHeads: begin_selective_length must be a whole number of at least 0; got {begin!r}")
        super().__post_init__()
        if self.budget_tokens is not None and self.budget_tokens % size:
            near = self.budget_tokens // size * size
            raise ValueError(
                f"LongHeads: budget_tokens={self.budget_tokens} must be whole chunks of chunk_size={size}, "
                f"such as {near} or {near + size}"
            )

    @property
    def smallest(self) -> int:
        return 3 * self.chunk_size

    def prepare(self, model: Any, cache: Any) -> None:
        if self.budget_tokens is None:
            return
        from manyheads.hosts.families import rotations

        try:
            found = rotations(model)
        except ValueError as error:
            reason = str(error).split("; use positions")[0]
            raise ValueError(f"LongHeads reads chunks at new positions; {reason}") from error
        for layer, angles in zip(cache.layers, found, strict=True):
            layer.angles = angles

    def read(self, layer: Any, queries: Tensor, group: Group, scoring: Scoring, seen: Visibility) -> Tensor | None:
        if self.budget_tokens is None or layer.window is not None:
            return None
        first = first_slots(seen, layer.seen, queries.device)
        n, size, limit = queries.shape[3], self.chunk_size, max(self.budget_tokens, self.begin_selective_length or 0)
        with torch.no_grad():
            represent(layer, queries, group, scoring, first, seen.offset, size)
        # Queries below the limit in all rows, and in some: the first see everything they have, as ever.
        below, reach = (max(0, min(n, int(end) + limit - seen.offset)) for end in (first.min(), first.max()))
        if below == n:
            return None
        layer.read = self.budget_tokens
        block = max(1, BLOCK_READ // (queries.shape[0] * queries.shape[1] * self.budget_tokens * queries.shape[4]))
        parts = []
        for start in range(below, n, block):
            here = queries[:, :, :, start : start + block]
            slots = torch.arange(start, start + here.shape[3], device=queries.device) + seen.offset
            parts.append(self.selective(layer, here, group, scoring, slots - first[:, None], first))
        chosen = torch.cat(parts, 3)
        if not reach:
            return chosen
        # One query alone would be taken for the last, which sees all.
        every = layer.ordinary(queries[:, :, :, : max(reach, 2)], scoring, seen)[:, :, :, :reach]
        position = torch.arange(below, reach, device=queries.device) + seen.offset - first[:, None]
        early = (position < limit)[:, None, None, :, None]
        both = torch.where(early, every[:, :, :, below:], chosen[:, :, :, : reach - below])
        return torch.cat([every[:, :, :, :below], both, chosen[:, :, :, reach - below :]], 3)

    def selective(
        self, layer: Any, queries: Tensor, group: Group, scoring: Scoring, position: Tensor, first: Tensor
    ) -> Tensor:
        """Queries [b, g, r, t, d] at position [b, t] in texts that begin at slot first [b]; [b, g, r, t, dv]."""
        assert self.budget_tokens is not None
        assert group.first is not None
        size, angles, position = self.chunk_size, layer.angles, position.clamp_min(0)
        original = queries if angles is None else turn(queries, -position[:, None, None], angles.to(queries.device))
        chunks = choose(original.sum(2), layer.memo["chunks"], position // size, self.budget_tokens // size)
        places = chunks[..., None] * size + torch.arange(size, device=queries.device)
        visible = (chunks >= 0)[..., None] & (places <= position[:, None, :, None, None])
        at = (places + first[:, None, None, None, None] - group.first).clamp(0, group.length - 1)
        asking = queries.permute(0, 1, 3, 2, 4).unsqueeze(3).expand(-1, -1, -1, chunks.shape[3], -1, -1)
        if angles is not None:
            # Chunk number s of those read moves from its place in the text to s * size, and the query to the last one:
            # the query is turned by what its distance to the chunk changes.
            order = torch.arange(chunks.shape[3], device=queries.device)
            count = (chunks >= 0).sum(-1, keepdim=True)
            moved = ((count - 1) - order - (position // size)[:, None, :, None] + chunks) * size
            asking = turn(asking, moved[..., None], angles.to(queries.device))
        out = []
        for here, heads in head_blocks(queries.shape[1], queries.shape[2], queries.device):
            keys, values = (
                take(group.view("keys")[:, here], at[:, here]),
                take(group.view("values")[:, here], at[:, here]),
            )
            scores = (asking[:, here] @ keys.transpose(4, 5)).permute(0, 1, 4, 2, 3, 5).flatten(4)
            sinks = None if scoring.sinks is None else scoring.sinks[heads]
            part = Scoring(scoring.scale, scoring.softcap, sinks)
            weights = _softmax(scores, visible[:, here].flatten(3)[:, :, None], part).to(values.dtype)
            out.append((weights.transpose(2, 3) @ values.flatten(3, 4)).transpose(2, 3))
        return torch.cat(out, 1)


def first_slots(seen: Visibility, total: int, device: torch.device) -> Tensor:
    """[b or 1]: the slot at which each row's text begins."""
    if not seen.plain:
        raise ValueError("LongHeads: a mask of the caller's own has no chunks; give a 2-D mask, padded on the left")
    if seen.padding is None:
        return torch.zeros(1, dtype=torch.long, device=device)
    padding = seen.padding[:, :total]
    first = total - padding.sum(1)
    if not bool((padding == (torch.arange(total, device=padding.device) >= first[:, None])).all()):
        raise ValueError(
            "LongHeads: padding within a text breaks its chunks; pad the prompt on the left, and only there"
        )
    return first.to(device)


def choose(queries: Tensor, chunks: Tensor, own: Tensor, count: int) -> Tensor:
    """Chunks to read in the order of the text, [b, g, t, count], -1 last where there are fewer.

    queries [b, g, t, d], summed over a KV head's own; chunks [b, g, c, d]; own [b or 1, t]: the queries' chunks."""
    # The latest chunk is not complete: nothing represents it, and it is read by whoever stands in it.
    scores = pad(queries.to(torch.promote_types(queries.dtype, torch.float32)) @ chunks.transpose(2, 3), (0, 1))
    last, own = scores.shape[3], own[:, None, :, None]
    number = torch.arange(last, device=own.device)
    scores = torch.where((number == 0) | (number >= own - 1), torch.inf, scores).masked_fill(number > own, -torch.inf)
    top, best = scores.topk(min(count, last), dim=-1)
    # None sorts behind all others.
    best = best.masked_fill(top == -torch.inf, last).sort(-1).values
    return best.masked_fill(best == last, -1)


def _softmax(scores: Tensor, visible: Tensor, scoring: Scoring) -> Tensor:
    """Weights [b, g, r, t, m] of products q k, with a soft cap and sinks where the layer has them."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if scoring.sinks is None:
        return scores.softmax(-1)
    b, g, r, t, m = scores.shape
    sinks = scoring.sinks.to(scores.dtype).view(1, g, r, 1, 1).expand(b, g, r, t, 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :m]


def represent(
    layer: Any, queries: Tensor, group: Group, scoring: Scoring, first: Tensor, before: int, size: int
) -> None:
    """Brings layer.memo up to date: "chunks" [b, g, c, d], and the latest queries [b, place, g, r, d] of chunks not yet
    complete with their "slots" [b, place], slot s at place s % length."""
    b, g, r, n, d = queries.shape
    memo, room = layer.memo, size + TRIAL
    if not memo:
        if group.value_dim != d:
            raise ValueError("LongHeads asks keys by a mean of values: both must have one size, and here have not")
        memo["chunks"] = queries.new_empty(b, g, 0, d, dtype=torch.promote_types(queries.dtype, torch.float32))
        memo["queries"] = queries.new_empty(b, room, g, r, d)
        memo["slots"] = torch.full((b, room), -1, device=queries.device)
    done, complete = ((end - first).div(size, rounding_mode="floor").clamp_min(0) for end in (before, before + n))
    for chunk in range(int(done.min()), int(complete.max())):
        ends = (done <= chunk) & (chunk < complete)
        if not bool(ends.any()):
            continue
        slots = first[:, None] + chunk * size + torch.arange(size, device=first.device)
        new = _representation(layer, _queries_of(memo, queries, slots, before, ends), group, scoring, slots, chunk)
        held = memo["chunks"]
        if chunk == held.shape[2]:
            memo["chunks"] = torch.cat([held, new.unsqueeze(2)], 2)
        else:
            held[:, :, chunk] = torch.where(ends[:, None, None], new, held[:, :, chunk])
    late = min(n, room)
    slots = torch.arange(before + n - late, before + n, device=queries.device)
    memo["queries"][:, slots % room] = queries[:, :, :, n - late :].permute(0, 3, 1, 2, 4)
    memo["slots"][:, slots % room] = slots


def _queries_of(memo: dict[str, Tensor], queries: Tensor, slots: Tensor, before: int, ends: Tensor) -> Tensor:
    """[b, g, r, size, d]: the queries at slots [b or 1, size], from this pass or from earlier ones."""
    rows, room = torch.arange(queries.shape[0], device=queries.device)[:, None], memo["slots"].shape[1]
    old, slots = slots < before, slots.expand(len(rows), -1)
    kept = memo["slots"][rows, slots % room] == slots
    if bool((old & ~kept & ends[:, None]).any()):
        raise ValueError(
            f"LongHeads: more than {room - kept.shape[1]} tokens were taken back, and with them queries that a chunk "
            "needs; feed the text to a new cache"
        )
    new = queries.permute(0, 3, 1, 2, 4)[rows, (slots - before).clamp(0, queries.shape[3] - 1)]
    return torch.where(old[..., None, None, None], memo["queries"][rows, slots % room], new).permute(0, 2, 3, 1, 4)


def _representation(layer: Any, queries: Tensor, group: Group, scoring: Scoring, slots: Tensor, chunk: int) -> Tensor:
    """[b, g, d] of one chunk, from its queries [b, g, r, size, d]."""
    assert group.first is not None
    b, g, _, size, _ = queries.shape
    at = (slots - group.first).clamp(0, group.length - 1).expand(b, -1)[:, None].expand(b, g, size)
    keys, values = take(group.view("keys"), at), take(group.view("values"), at)
    # Attention within the chunk knows distances alone: positions of the text serve as well as those of the chunk.
    each = scaled_dot_product_attention(queries.flatten(2, 3), keys, values, scale=scoring.scale)
    if layer.angles is not None:
        keys = turn(keys, torch.tensor(-chunk * size, device=keys.device), layer.angles.to(keys.device))
    mean = each.mean(2, keepdim=True)
    new = scaled_dot_product_attention(mean, keys, keys, scale=scoring.scale)[:, :, 0]
    return new.to(layer.memo["chunks"].dtype)
