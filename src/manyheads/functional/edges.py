"""Attention along edges, with memory for the edges and not for all pairs of nodes.

b batch, n nodes, e edges, h heads, d features of a head. An edge is (source, target): the target attends to the source.
An edge given twice counts twice; a node without an edge gets zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.functional.precision import own_dtype

# Edges whose vectors of features stand in memory at once; on a CPU, in its cache.
BLOCK, CPU_BLOCK = 1 << 16, 1 << 11
# Ways of two edges that are listed at once, but for the ways into one node.
BLOCK_WAYS = 1 << 22


def edge_dot(q: Tensor, k: Tensor, edges: Tensor) -> Tensor:
    """q_target . k_source of each edge: q, k [b, n, h, d], edges [2, e] -> [b, e, h], at least in float32."""
    scores: Tensor = _Dot.apply(q, k, edges)
    return scores


def edge_mix(weights: Tensor, v: Tensor, edges: Tensor, nodes: int) -> Tensor:
    """The sum of weight times v_source over the edges into each target: weights [b, e, h], v [b, n, h, d] ->
    [b, nodes, h, d]."""
    mixed: Tensor = _Mix.apply(weights, v, edges, nodes)
    return mixed


def edge_softmax(scores: Tensor, target: Tensor, nodes: int, allowed: Tensor | None = None) -> Tensor:
    """Softmax over the edges with the same target: scores [b, e, h], target [e], allowed [b, e] -> weights [b, e, h].

    At least in float32, in which it returns; zero where not allowed.
    """
    b, e, h = scores.shape
    with own_dtype(scores):
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if allowed is not None:
            wide = wide.masked_fill(~allowed[..., None], -torch.inf)
        place = flat(target, b, nodes)
        rows = wide.reshape(b * e, h)
        highest = rows.detach().new_full((b * nodes, h), -torch.inf)
        highest = highest.scatter_reduce(0, place[:, None].expand(-1, h), rows.detach(), "amax")
        parts = (rows - highest.masked_fill(highest == -torch.inf, 0.0)[place]).exp()
        total = parts.new_zeros(b * nodes, h).index_add(0, place, parts)
        # The largest part of a target is one: only where none is allowed is the total less than that.
        return (parts / total.clamp(min=1e-6)[place]).view(b, e, h)


def flat(index: Tensor, batch: int, nodes: int) -> Tensor:
    """Nodes [e], the same in each row of a batch, as places among batch * nodes: [batch * e]."""
    offset = torch.arange(batch, device=index.device)[:, None] * nodes
    return (index + offset).flatten()


def real_edges(padding: Tensor | None, edges: Tensor) -> Tensor | None:
    """[b, e], whether both ends are real, of padding [b, n]; None where all are."""
    return None if padding is None else padding[:, edges[0]] & padding[:, edges[1]]


def with_loops(edges: Tensor, nodes: int) -> Tensor:
    """The edges with one loop at each node, whether it had none or several; the loops come last."""
    loops = torch.arange(nodes, device=edges.device).expand(2, -1)
    return torch.cat([edges[:, edges[0] != edges[1]], loops], 1)


def dense_weights(weights: Tensor, edges: Tensor, nodes: int) -> Tensor:
    """[b, e, h] -> [b, h, nodes, nodes], for those who ask for it: target by source."""
    b, e, h = weights.shape
    place = flat(edges[1] * nodes + edges[0], b, nodes * nodes)
    matrix = weights.new_zeros(b * nodes * nodes, h).index_add(0, place, weights.reshape(b * e, h))
    return matrix.view(b, nodes, nodes, h).permute(0, 3, 1, 2)


def sample_edges(edges: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` edges into each target, drawn without replacement, in the order in which they were given.

    edges [2, e]; the same for the same seed. Takes the time of two sorts.
    """
    if count < 1:
        raise ValueError(f"sample_edges: count={count}; want at least one edge for each target")
    draw = torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(seed)).to(edges.device)
    kept = draw[rank_in_group(edges[1][draw]) < count]
    return edges[:, kept.sort().values]


def sample_two_hops(edges: Tensor, nodes: int, count: int, seed: int) -> Tensor:
    """For each node itself and count - 1 of the nodes from which one edge or two lead to it: [nodes, count].

    Drawn without replacement from both lists one behind the other, as LargeGT's own sampling is (a node in both stands
    twice; one with a way back is in the second itself); fewer than wanted are repeated in turn, and in place of none
    any nodes are drawn. The same for the same seed. Ways of two edges are gone through in blocks.
    """
    if count < 1:
        raise ValueError(f"sample_two_hops: count={count}; want at least the node itself")
    rng = torch.Generator().manual_seed(seed)
    edges = edges[:, edges[1].argsort(stable=True)].cpu()
    degree = torch.bincount(edges[1], minlength=nodes)
    ways = torch.zeros(nodes, dtype=torch.int64).index_add(0, edges[1], degree[edges[0]])
    parts, first = [], 0
    for size in ((ways + degree).cumsum(0) // BLOCK_WAYS).unique_consecutive(return_counts=True)[1].tolist():
        lists = _two_lists(edges, degree, first, size)
        one, two = (_lengths(each // nodes - first, size) for each in lists)
        places = _draw_places(one + two, count - 1, rng)
        parts.append(_read_places(lists, places, nodes, first, size))
        first += size
    around = torch.cat(parts) if parts else edges.new_zeros(0, count - 1)
    anywhere = torch.randint(nodes, around.shape, generator=rng)
    return torch.cat([torch.arange(nodes)[:, None], torch.where(around < 0, anywhere, around)], 1)


def _lengths(group: Tensor, groups: int) -> Tensor:
    return torch.bincount(group, minlength=groups)


def _two_lists(edges: Tensor, degree: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """target * nodes + source, sorted and once each, of the ways of one edge and of two into `size` nodes from `first`
    on. edges are sorted by target."""
    nodes, end = len(degree), degree.cumsum(0)
    into = edges[:, int(end[first] - degree[first]) : int(end[first + size - 1])]
    times = degree[into[0]]
    offset = torch.arange(int(times.sum())) - (times.cumsum(0) - times).repeat_interleave(times)
    second = edges[0][(end[into[0]] - times).repeat_interleave(times) + offset]
    one, two = into[1] * nodes + into[0], into[1].repeat_interleave(times) * nodes + second
    return _once(one), _once(two)


def _once(numbers: Tensor) -> Tensor:
    """Sorted, each once. NumPy sorts whole numbers four times as fast as torch."""
    return torch.from_numpy(np.sort(numbers.numpy())).unique_consecutive()


def _draw_places(lengths: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` places of each list, without replacement where it has so many (Floyd's way), else each in turn."""
    start = (lengths - count).clamp(min=0)
    places = torch.arange(count).remainder(lengths[:, None].clamp(min=1))
    for step in range(count):
        last = start + step
        drawn = (torch.rand(len(lengths), generator=rng, dtype=torch.float64) * (last + 1)).long()
        taken = (places[:, :step] == drawn[:, None]).any(1)
        places[:, step] = torch.where(lengths < count, places[:, step], torch.where(taken, last, drawn))
    return places


def _read_places(lists: tuple[Tensor, Tensor], places: Tensor, nodes: int, first: int, size: int) -> Tensor:
    """The sources at these places of both lists, one behind the other; -1 where both are empty."""
    one, two = (_lengths(each // nodes - first, size) for each in lists)
    in_one = places < one[:, None]
    from_one = (one.cumsum(0) - one)[:, None] + places
    from_two = len(lists[0]) + (two.cumsum(0) - two - one)[:, None] + places
    every = torch.cat([*lists, lists[0].new_zeros(1)])
    found = every[torch.where(in_one, from_one, from_two).clamp(max=len(every) - 1)] % nodes
    return found.masked_fill((one + two == 0)[:, None], -1)


def rank_in_group(group: Tensor) -> Tensor:
    """How many places before each one hold the same number: [e] -> [e]."""
    order = group.argsort(stable=True)
    lengths = group.unique(return_counts=True)[1]
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - starts
    return rank


def _block(x: Tensor) -> int:
    return CPU_BLOCK if x.device.type == "cpu" else BLOCK


def _rows(x: Tensor, index: Tensor, batch: int) -> Tensor:
    """[b * n, h * d] at the nodes [part of e] of each row of a batch -> [b * part, h * d], at least in float32. Whole
    rows by `index_select`: three times as fast on a CPU as an index between slices."""
    at = flat(index, batch, x.shape[0] // batch)
    return x.index_select(0, at).to(torch.promote_types(x.dtype, torch.float32))


class _Dot(torch.autograd.Function):
    """Keeps q and k, and not the vectors that each edge reads of them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, edges: Tensor) -> Tensor:
        with own_dtype(q):
            b, _, h, d = q.shape
            flat_q, flat_k = q.reshape(-1, h * d), k.reshape(-1, h * d)
            parts = []
            for at in edges.split(_block(q), 1):
                products = _rows(flat_q, at[1], b).mul_(_rows(flat_k, at[0], b))
                parts.append(products.view(b, -1, h, d).sum(-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, edges = ctx.saved_tensors
        to_q = edge_mix(gradient, k, edges, q.shape[1]) if ctx.needs_input_grad[0] else None
        to_k = edge_mix(gradient, q, edges.flip(0), k.shape[1]) if ctx.needs_input_grad[1] else None
        return to_q, to_k, None


class _Mix(torch.autograd.Function):
    """The same for weights and v: each is the other's gradient."""

    @staticmethod
    def forward(weights: Tensor, v: Tensor, edges: Tensor, nodes: int) -> Tensor:
        (b, _, h, d), wide = v.shape, torch.promote_types(v.dtype, torch.float32)
        with own_dtype(v):
            mixed = torch.zeros(b * nodes, h * d, dtype=wide, device=v.device)
            flat_v, block = v.reshape(-1, h * d), _block(v)
            for part, at in zip(weights.split(block, 1), edges.split(block, 1), strict=True):
                sent = _rows(flat_v, at[0], b).view(b, -1, h, d).mul_(part.to(wide)[..., None])
                mixed.index_add_(0, flat(at[1], b, nodes), sent.view(-1, h * d))
            return mixed.view(b, nodes, h, d).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, v, edges = ctx.saved_tensors
        to_weights = to_v = None
        if ctx.needs_input_grad[0]:
            to_weights = edge_dot(gradient, v, edges).to(weights.dtype)
        if ctx.needs_input_grad[1]:
            to_v = edge_mix(weights, gradient, edges.flip(0), v.shape[1]).to(v.dtype)
        return to_weights, to_v, None, None
