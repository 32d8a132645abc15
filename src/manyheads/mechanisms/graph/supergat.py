"""SuperGAT: graph attention that learns from the edges themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.finite import blanked
from manyheads.functional.edges import dense_weights, edge_dot, edge_mix, edge_softmax, real_edges, with_loops
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class SuperGAT(Mechanism):
    """Nodes attend to their neighbours by scores that also say how likely the edge is, and are trained to say so.

        g_i = W x_i, per head;  p_ij = g_i . g_j
        form="mx": s_ij = (a_l . g_j + a_r . g_i) sigmoid(p_ij);   form="sd": s_ij = p_ij / sqrt(d)
        y_i = sum_j softmax_j(LeakyReLU_0.2(s_ij)) g_j + b,  j over the sources of edges into i, and i

    edges: [2, e] integers, sources above targets; each node has one loop, given or not. Losses, in training: `edge`,
    the binary cross entropy of p_ij (of s_ij for sd), mean of the heads, of a part `sampled` of the edges against
    `negatives` times as many drawn pairs that are none. Time and memory in edges. Padded nodes and edges to them count
    nowhere, in the loss neither. Weights [b, heads, n, n] only where asked for.

    Source: Kim and Oh, How to Find Your Friendly Neighborhood, ICLR 2021, arXiv:2204.04879, and torch_geometric's
    SuperGATConv, without dropout. Pairs are drawn with replacement, and fewer where a graph has hardly any that are
    no edges.
    Weights: lin is proj, att_l and att_r [1, heads, d] without their first axis, bias as it is. The authors' own code
    holds [a_r; a_l] as one vector over (x_i, x_j).
    """

    card = Card(
        name="supergat",
        title="How to Find Your Friendly Neighborhood: Graph Attention Design with Self-Supervision",
        reference="arXiv:2204.04879",
        family=Family.GRAPH,
        patterns={"graph"},
        time="e",
        state="",
        decodes=False,
        notes="the loss `edge` wants a weight of its own; the paper tries 0.001 to 10",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        form: str = "mx",
        negatives: float = 0.5,
        sampled: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if form not in ("mx", "sd") or not negatives >= 0 or not 0 < sampled <= 1:
            raise ValueError(
                f"supergat: form={form!r}, negatives={negatives}, sampled={sampled}; want 'mx' or 'sd', negatives >= 0 "
                "and 0 < sampled <= 1"
            )
        self.form, self.negatives, self.sampled = form, negatives, sampled
        self.proj = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.proj.weight)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.att_l = self.att_r = None
        if form == "mx":
            self.att_l, self.att_r = (
                nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, self.head_dim))) for _ in range(2)
            )

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        n, real = x.shape[1], call.padding
        given = call.inputs["edges"]
        if real is not None:
            x = blanked(x, ~real)
        nodes = self.proj(x).unflatten(-1, (self.heads, self.head_dim))
        edges = with_loops(given, n)
        pairs = edge_dot(nodes, nodes, edges)
        scores = F.leaky_relu(self._scores(nodes, edges, pairs), 0.2)
        weights = edge_softmax(scores, edges[1], n, real_edges(real, edges))
        output = edge_mix(weights, nodes, edges, n).flatten(-2)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        losses = self._edge_loss(nodes, edges, pairs, real) if self.training else {}
        matrix = dense_weights(weights, edges, n).to(x.dtype) if call.need_weights else None
        return Result(output, matrix, losses)

    def _scores(self, nodes: Tensor, edges: Tensor, pairs: Tensor) -> Tensor:
        if self.att_l is None or self.att_r is None:
            return pairs * self.head_dim**-0.5
        from_source, from_target = ((nodes * a).sum(-1) for a in (self.att_l, self.att_r))
        return (from_source[:, edges[0]] + from_target[:, edges[1]]) * pairs.sigmoid()

    def _edge_loss(self, nodes: Tensor, edges: Tensor, pairs: Tensor, real: Tensor | None) -> Mapping[str, Tensor]:
        n, count = nodes.shape[1], edges.shape[1]
        kept = torch.rand(count, device=edges.device) < self.sampled
        others, valid = _no_edges(edges, n, int(self.negatives * self.sampled * count))
        logits = torch.cat([pairs, edge_dot(nodes, nodes, others)], 1)
        if self.form == "sd":
            logits = logits * self.head_dim**-0.5
        every = torch.cat([edges, others], 1)
        counted = torch.cat([kept, valid]).expand(len(nodes), -1)
        both = real_edges(real, every)
        counted = counted if both is None else counted & both
        is_edge = torch.arange(every.shape[1], device=edges.device) < count
        cost = F.binary_cross_entropy_with_logits(
            logits.mean(-1), is_edge.to(logits.dtype).expand(len(nodes), -1), reduction="none"
        )
        return {"edge": cost.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)}


def _no_edges(edges: Tensor, nodes: int, count: int) -> tuple[Tensor, Tensor]:
    """Pairs [2, 3 count] drawn from all, and which of them stand for the `count` wanted: the first that are no edge."""
    drawn = torch.randint(nodes, (2, 3 * count), device=edges.device)
    free = ~torch.isin(drawn[0] * nodes + drawn[1], edges[0] * nodes + edges[1])
    return drawn, free & (free.cumsum(0) <= count)
