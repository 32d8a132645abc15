"""Relation-aware attention on graphs whose edges carry labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.finite import blanked
from manyheads.functional.edges import dense_weights, edge_dot, edge_mix, edge_softmax, real_edges
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class RelationAware(Mechanism):
    """Keys and values carry a learned vector for the label of the edge that they come along.

        y_i = W_o sum_e a_e (v_j + A^V[l_e]),  a = softmax_e(q_i . (k_j + A^K[l_e]) / sqrt(d)),  e: edges j -> i

    edges: [2, e] integers, sources above targets; labels: [e] integers below `labels`, or [1, e]. Two edges between the
    same nodes, of different labels, both count. Tables A^K, A^V [labels, d] are shared by the heads. Time and memory in
    edges: a label's vectors are read as a neighbour's are, never held per edge. A node without edges gets zeros.

    Source: Shaw et al., arXiv:1803.02155, section 3.2 (`labeled, directed, fully-connected graph`) on any graph; the
    form for sequences, where labels are clipped distances, is `shaw`. Both terms of the score are scaled, as there.
    """

    card = Card(
        name="relation-aware",
        title="Self-Attention with Relative Position Representations",
        reference="arXiv:1803.02155",
        family=Family.GRAPH,
        patterns={"graph"},
        time="e",
        state="",
        decodes=False,
        example={"labels": 3},
        takes={"labels": "[e] integers, the label of each edge"},
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, labels: int = 8, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if labels < 1:
            raise ValueError(f"relation-aware: labels={labels}; want at least one")
        self.labels, self.scale = labels, self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.key_table = nn.Parameter(torch.empty(labels, self.head_dim))
        self.value_table = nn.Parameter(torch.empty(labels, self.head_dim))
        nn.init.xavier_uniform_(self.key_table)
        nn.init.xavier_uniform_(self.value_table)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        assert edges is not None
        return {"labels": (edges[0] + 2 * edges[1]) % self.labels}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        n, edges, real = x.shape[1], call.inputs["edges"], call.padding
        labels = self._checked(call.inputs["labels"], edges)
        if real is not None:
            x = blanked(x, ~real)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        from_label = torch.stack([labels, edges[1]])
        scores = self.scale * (edge_dot(q, k, edges) + edge_dot(q, self._rows(self.key_table, q), from_label))
        weights = edge_softmax(scores, edges[1], n, real_edges(real, edges))
        mixed = edge_mix(weights, v, edges, n) + edge_mix(weights, self._rows(self.value_table, v), from_label, n)
        matrix = dense_weights(weights, edges, n).to(x.dtype) if call.need_weights else None
        return Result(self.o_proj(mixed.flatten(-2)), matrix)

    def _rows(self, table: Tensor, like: Tensor) -> Tensor:
        """[labels, d] as [b, labels, h, d]."""
        return table.to(like.dtype)[None, :, None].expand(like.shape[0], -1, self.heads, -1)

    def _checked(self, labels: Any, edges: Tensor) -> Tensor:
        fits = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.device == edges.device
        if not fits or tuple(labels.shape) not in ((edges.shape[1],), (1, edges.shape[1])):
            given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)[:80]
            raise ValueError(f"relation-aware: labels are {given}; want int64 [{edges.shape[1]}] on {edges.device}")
        known = torch.compiler.is_compiling() or labels.is_meta or not labels.numel()
        if not known and not 0 <= int(labels.min()) <= int(labels.max()) < self.labels:
            raise ValueError(
                f"relation-aware: labels from {int(labels.min())} to {int(labels.max())}; want 0 to {self.labels - 1}"
            )
        return labels.flatten()
