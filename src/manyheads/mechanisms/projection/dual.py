"""Dual attention: sensory and relational heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix
from manyheads.functional.passes import attend_where, joined
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.softmax import Where


@register
class Dual(Mechanism):
    """Some heads read what the tokens are, the others how they relate to the query, with a symbol of what was read.

        sensory head: softmax_j(q_i . k_j / sqrt(d)) v_j
        relational head h: sum_j alpha_ij^h (W_r^h r_ij + W_s^h s_j),  alpha^h as above, with q and k of its own,
            r_ij^l = (W_rq^l x_i) . (W_rk^l x_j) / sqrt(p) for l < relations, p = d relational_heads / relations
        s_j = multi-head attention of x_j to `symbols` learned templates, over as many learned symbols

    A relation is linear in x_j: alpha weighs W_rk x_j, and the product with W_rq x_i follows, so that no r per pair is
    held. Both groups have an output projection of their own width; results lie side by side.
    Source: Altabaa and Lafferty, arXiv:2405.16727, and its code (DualAttention, SymbolicAttention), with its default of
    no activation on r. Divergence: s_j has `heads` heads, the code's symbols a number of their own. Its other symbols
    (by position, by relative position) and shared attention are left out.
    Weights: rows of q_proj and k_proj are the sensory heads' and then wq_attn and wk_attn; relation_mix is wr,
    symbol_proj wv.
    """

    card = Card(
        name="dual",
        title="Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
        reference="arXiv:2405.16727",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2 relational_heads",
        state="n",
        example={"relational_heads": 2, "relations": 4, "symbols": 5},
        notes="At 512 tokens it takes 1.2 times as long as the authors' dual-attention, which holds the matrix; at "
        "2,048 less than half.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        relational_heads: int | None = None,
        relations: int | None = None,
        symbols: int = 64,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        d = self._split_heads()
        self.relational = max(heads // 2, 1) if relational_heads is None else relational_heads
        if not 1 <= self.relational <= heads:
            raise ValueError(f"dual: relational_heads={relational_heads} of heads={heads}; want 1 to {heads}")
        wide, self.relations = self.relational * d, self.relational if relations is None else relations
        if self.relations < 1 or wide % self.relations or symbols < 1:
            raise ValueError(
                f"dual: relations={relations} must divide the {wide} features of the relational heads, and "
                f"symbols={symbols} be positive"
            )
        self.scale, self.sensory = d**-0.5, heads - self.relational
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.relation_q_proj, self.relation_k_proj = nn.Linear(dim, wide, bias=bias), nn.Linear(dim, wide, bias=bias)
        self.relation_mix = nn.Parameter(torch.empty(self.relational, d, self.relations))
        nn.init.kaiming_uniform_(self.relation_mix, a=5**0.5)
        self.templates, self.library = nn.Parameter(torch.randn(symbols, dim)), nn.Parameter(torch.randn(symbols, dim))
        self.template_q_proj = nn.Linear(dim, dim)
        self.symbol_proj = nn.Linear(dim, wide, bias=bias)
        self.relational_o_proj = nn.Linear(wide, wide, bias=bias)
        self.v_proj = nn.Linear(dim, dim - wide, bias=bias) if self.sensory else None
        self.o_proj = nn.Linear(dim - wide, dim - wide, bias=bias) if self.sensory else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k = self._split(self.q_proj(x), self.heads), self._split(self.k_proj(x), self.heads)
        own = [self.relation_k_proj(x)[:, None], self._split(self.symbol_proj(self._symbols(x)), self.relational)]
        if self.v_proj is not None:
            own.append(self._split(self.v_proj(x), self.sensory))
        names = dict(zip(("keys", "relation_keys", "symbols", "values"), (k, *own), strict=False))
        where, (k, relation_k, symbols, *v) = joined(call, x, self.causal, **names)
        read, alpha = self._attend(
            q[:, self.sensory :], k[:, self.sensory :], symbols, where, call, self.sensory, relation_k
        )
        parts, weights = [self.relational_o_proj(self._join(self._relate(x, read)))], [alpha]
        if self.o_proj is not None:
            mixed, weight = self._attend(q[:, : self.sensory], k[:, : self.sensory], v[0], where, call, 0)
            parts.insert(0, self.o_proj(self._join(mixed)))
            weights.insert(0, weight)
        return Result(torch.cat(parts, -1), torch.cat(weights, 1) if call.need_weights else None)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where, call: Call, first: int, shared: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Attention of a group of heads, from head `first` on. shared [b, 1, m, .]: values of all of them, read before
        each one's own v."""
        if where.dense is not None and where.dense.shape[1] > 1:
            where = replace(where, dense=where.dense[:, first : first + q.shape[1]])
        if shared is not None:
            if call.need_weights or q.shape[2] <= shared.shape[-1]:
                # For so few queries the weights are smaller than a copy of `shared` for every head would be.
                mixed, weights = attend_where(q, k, v, where, scale=self.scale, need_weights=True)
                assert weights is not None
                return torch.cat([grouped_mix(weights, shared), mixed], -1), weights
            v = torch.cat([shared.expand(-1, q.shape[1], -1, -1), v], -1)
        size = v.shape[-1]
        if not call.need_weights:
            # PyTorch's kernel that holds no [n, m] matrix wants one size for keys and values: zeros change neither.
            q, k = (F.pad(t, (0, size - t.shape[-1])) for t in (q, k))
        return attend_where(q, k, v, where, scale=self.scale, need_weights=call.need_weights)

    def _relate(self, x: Tensor, read: Tensor) -> Tensor:
        """read [b, h, n, relations p + d]: weighted relation keys and symbols -> [b, h, n, d]."""
        keys, symbols = read.split([self.relation_k_proj.out_features, self.relation_mix.shape[1]], -1)
        queries = self.relation_q_proj(x)[:, None].unflatten(-1, (self.relations, -1))
        related = (queries * keys.unflatten(-1, (self.relations, -1))).sum(-1) * queries.shape[-1] ** -0.5
        return related @ self.relation_mix.transpose(-1, -2) + symbols

    def _symbols(self, x: Tensor) -> Tensor:
        q = self._split(self.template_q_proj(x), self.heads)
        tables = (self._split(table[None], self.heads) for table in (self.templates, self.library))
        k, v = (table.expand(len(x), -1, -1, -1) for table in tables)
        return self._join(attend_weighted(q, k, v, None, scale=self.scale, need_weights=False)[0])

    def _split(self, tokens: Tensor, heads: int) -> Tensor:
        return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _join(self, heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(-2)
