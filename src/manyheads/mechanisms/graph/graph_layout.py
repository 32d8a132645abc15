"""Graph attention over the layout of a page, of GraphLayoutLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.finite import blanked
from manyheads.functional.edges import dense_weights, edge_dot, edge_mix, edge_softmax, rank_in_group, real_edges
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class GraphLayout(Mechanism):
    """Words attend to the words of segments that a graph of the page joins with theirs, in one layer on top of a model.

        y = x + W_o a v,  a_ij = softmax_j(q_i . k_j / sqrt(d)) over the edges j -> i,  q, k, v of LN(x)

    edges: [2, e] between words; `layout_graph` makes the graph of segments of their boxes and the order to read them
    in, `word_edges` makes edges between words of it. Time and memory in edges. The residual and the norm are inside.

    Source: Li et al., Enhancing Visually-Rich Document Understanding via Layout Structure Modeling, arXiv:2308.07777,
    and its released code, without dropout, where the graph is a dense mask of 0 and -9e15, in which a word without any
    edge attends evenly to all; here it gets nothing, and y = x + bias. There heads are half of those of the model
    below.
    Weights: graph_attention_layer query, key, value, final are q, k, v, o_proj; sublayer.norm is norm.
    """

    card = Card(
        name="graph-layout",
        title="Enhancing Visually-Rich Document Understanding via Layout Structure Modeling",
        reference="arXiv:2308.07777",
        family=Family.GRAPH,
        patterns={"graph"},
        time="e",
        state="",
        decodes=False,
        notes="the residual and the norm in front are inside",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        self.norm = nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        n, edges, real = x.shape[1], call.inputs["edges"], call.padding
        normed = self.norm(x if real is None else blanked(x, ~real))
        q, k, v = (p(normed).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = edge_softmax(self.scale * edge_dot(q, k, edges), edges[1], n, real_edges(real, edges))
        output = x + self.o_proj(edge_mix(weights, v, edges, n).flatten(-2)).to(x.dtype)
        return Result(output, dense_weights(weights, edges, n).to(x.dtype) if call.need_weights else None)


def layout_graph(boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The order to read segments in, [s], and edges between them, [2, e], both ways and once each.

    boxes: [s, 4], left, top, right, bottom; groups: [s] integers, what belongs together. Segments of a group are put in
    order by insertion: each before the first that has it above, or on its left at the same height. The first is the
    parent of the others, and stands for the box around all of them among the groups, which are put in order in the same
    way. Edges join parent and child, and those of the children of one parent, or of the parents, that stand beside or
    above each other: the middle of the one lies within the other along one axis, and not along both.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or groups.shape != boxes.shape[:1]:
        raise ValueError(
            f"layout_graph: boxes {list(boxes.shape)}, groups {list(groups.shape)}; want [s, 4] and [s], one group "
            "for each box"
        )
    where = {i: tuple(box) for i, box in enumerate(boxes.tolist())}
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(i)
    families = {family[0]: family[1:] for family in (_inserted(some, where) for some in members.values())}
    around = {**where, **{head: _around([where[i] for i in (head, *rest)]) for head, rest in families.items()}}
    heads = _inserted(list(families), around)
    pairs = _beside(heads, around)
    order = []
    for head in heads:
        rest = families[head]
        order += [head, *rest]
        pairs |= {(head, child) for child in rest} | _beside(rest, where)
    both = sorted(pairs | {(b, a) for a, b in pairs})
    return torch.tensor(order, dtype=torch.int64), torch.tensor(both, dtype=torch.int64).reshape(-1, 2).T


def word_edges(segments: Tensor, edges: Tensor) -> Tensor:
    """Edges between all words of two segments, for each edge between segments: segments [n], which one each word is
    in (below 0: none, as pieces of the image), edges [2, e] -> [2, words of the one times words of the other, summed].
    """
    words = segments.argsort(stable=True)[int((segments < 0).sum()) :]
    size = torch.bincount(segments[words], minlength=int(edges.max()) + 1 if edges.numel() else 0)
    first = size.cumsum(0) - size
    each = size[edges[0]] * size[edges[1]]
    edge = torch.arange(edges.shape[1]).repeat_interleave(each)
    place, wide = rank_in_group(edge), size[edges[1]][edge]
    return torch.stack(
        [words[first[edges[0]][edge] + place // wide.clamp(min=1)], words[first[edges[1]][edge] + place % wide]]
    )


Box = tuple[float, ...]


def _side(one: Box, other: Box) -> tuple[int, int]:
    """On which side of the middle of the one the other lies, along both axes: -1, 0 (it holds the middle) or 1."""
    middle = ((one[0] + one[2]) / 2, (one[1] + one[3]) / 2)
    across, down = ((other[a] > middle[a]) - (other[a + 2] < middle[a]) for a in (0, 1))
    return across, down


def _inserted(some: list[int], where: dict[int, Box]) -> list[int]:
    order: list[int] = []
    for new in some:
        sides = (_side(where[old], where[new]) for old in order)
        place = next((i for i, (across, down) in enumerate(sides) if down < 0 or (down == 0 and across < 0)), None)
        order.insert(len(order) if place is None else place, new)
    return order


def _beside(some: list[int], where: dict[int, Box]) -> set[tuple[int, int]]:
    pairs = ((a, b, *_side(where[a], where[b])) for a in some for b in some if a != b)
    return {(a, b) for a, b, across, down in pairs if (across == 0) != (down == 0)}


def _around(boxes: list[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)
