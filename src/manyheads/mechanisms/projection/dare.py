"""Decoupled attention and representation embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class DARE(Mechanism):
    """Target attention that searches a history with one set of embeddings, and reads it with another.

        a_ij = softmax over the top_k of t^A_i . c^A_j / sqrt(side_dim),  h_i = sum_j a_ij c^R_j
        output = W_o [t^R_i; h_i; t^R_i * h_i]

    x: t^R, the representations of the target items [b, n, dim]; context: c^R, those of the behaviours [b, m, dim].
    search [b, n, side_dim] and context_search [b, m, side_dim]: t^A and c^A, the attention embeddings of both, from a
    table of its own and narrower; there are no projections, which did not decouple the two. W_o stands for the
    first layer of the classifier, which takes t, h and the target-aware product.
    top_k: behaviours left by the search (None: all). heads cut A and R into slices; heads=1 is the paper's. A history
    pooled for one target is x with n = 1.
    Source: Feng et al., arXiv:2410.02604, and its code (scaled dot product). There a part of the embedding for the time
    of a behaviour has a scale of its own.
    """

    card = Card(
        name="dare",
        title="Long-Sequence Recommendation Models Need Decoupled Embeddings",
        reference="arXiv:2410.02604",
        family=Family.PROJECTION,
        patterns={"noncausal-cross", "causal-cross"},
        time="n^2 side_dim",
        state="1",
        example={"side_dim": 8, "top_k": 4},
        takes={
            "search": "[b, n, side_dim], embeddings of x from a table of their own",
            "context_search": "[b, m, side_dim], those of the context",
        },
        notes="the state keeps nothing but the count of tokens: the context is read again at every pass",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, side_dim: int = 16, top_k: int | None = 20
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if side_dim < 1 or side_dim % heads or dim % heads:
            raise ValueError(
                f"dare: side_dim={side_dim} of the attention embedding, dim={dim} of the representation; want both "
                f"positive and multiples of heads={heads}"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"dare: top_k={top_k} must be positive (None: no search)")
        self.side_dim, self.top_k = side_dim, top_k
        self.scale = (side_dim // heads) ** -0.5
        # No o_proj, whose input would be heads side by side.
        self.joint_proj = nn.Linear(3 * dim, dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.state is not None:
            call.state.advance(x.shape[1])
        named = [("search", x), ("context_search", context)]
        q, k = (self._split(self._embedded(name, call.inputs[name], tokens)) for name, tokens in named)
        v = self._split(context)
        allowed = call.dense if call.padding is None else call.padding[:, None, None]
        if self.top_k is None:
            # PyTorch's kernel that holds no [n, m] matrix wants one size for keys and values: zeros change neither.
            width, size = v.shape[-1], max(q.shape[-1], v.shape[-1])
            q, k, v = (F.pad(t, (0, size - t.shape[-1])) for t in (q, k, v))
            mixed, weights = attend_weighted(q, k, v, allowed, scale=self.scale, need_weights=call.need_weights)
            mixed = mixed[..., :width]
        else:
            mixed, weights = self._search(q, k, v, allowed, self.top_k, call.need_weights)
        history = mixed.transpose(1, 2).flatten(-2)
        output = self.joint_proj(torch.cat([x, history, x * history], -1))
        return Result(output, weights)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        rows = torch.arange(n * self.side_dim).view(1, n, self.side_dim)
        return {"search": torch.sin(rows * 0.7), "context_search": torch.cos(rows * 1.3)}

    def _embedded(self, name: str, given: Any, tokens: Tensor) -> Tensor:
        wanted = (*tokens.shape[:2], self.side_dim)
        if not isinstance(given, Tensor) or given.shape != wanted or given.device != tokens.device:
            what = f"{list(given.shape)} on {given.device}" if isinstance(given, Tensor) else repr(given)[:80]
            raise ValueError(f"dare: {name} is {what}; want {list(wanted)} on {tokens.device}")
        return given

    def _search(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, top_k: int, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        scores = q * self.scale @ k.transpose(-1, -2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        best, index = scores.topk(min(top_k, scores.shape[-1]), -1)
        share = masked_softmax(best, None if allowed is None else best > -torch.inf)
        rows = torch.arange(len(v), device=v.device)[:, None, None, None]
        heads = torch.arange(self.heads, device=v.device)[:, None, None]
        mixed = (share[..., None, :] @ v[rows, heads, index]).squeeze(-2)
        return mixed, torch.zeros_like(scores).scatter(-1, index, share) if need_weights else None

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
