"""L-query and multi-query self-attention for sequences of items."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.passes import attend_where, joined
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

PARTS = ("q_proj", "k_proj", "v_proj")


@register
class LQuery(Mechanism):
    """The query is the mean of the last L tokens, less noisy than the last one alone; and the two kinds are combined.

        L-query: softmax(q_i . k_j / sqrt(d)) v_j over j <= i,  q_i = W_q mean(x_(i - L + 1) .. x_i) + b
        output = alpha (1-query attention) + (1 - alpha) (L-query attention), each with projections of its own

    window: L; a mean is over the real tokens among the last L places. alpha=0: the L-query attention alone, and the
    other is not built. Matrix: the two matrices combined in the same way, which is exact only where the values agree.
    Source: Zhu et al., arXiv:2311.01056, and its code (MQSA_TED.py): no output projection, biases everywhere. There the
    two run through blocks of their own and meet before the item logits, which are linear: in one block this is the
    same. The code's norm of the query and its residual, the normed mean, are the block's. The loss that teaches item
    embeddings who follows whom is `transition_loss`.
    Weights: the code's dense layers hold [in, out], so that each is transposed here.
    """

    card = Card(
        name="l-query",
        title="Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for "
        "Sequential Recommendation",
        reference="arXiv:2311.01056",
        family=Family.PROJECTION,
        patterns={"causal-self"},
        time="n^2",
        state="n",
        example={"window": 3},
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = True, window: int = 3, alpha: float = 0.5) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        if window < 1:
            raise ValueError(f"l-query: window={window} must be positive")
        if not 0 <= alpha < 1:
            raise ValueError(f"l-query: alpha={alpha} is the part of the 1-query attention; want 0 <= alpha < 1")
        self.window, self.alpha = window, alpha
        self.long = nn.ModuleDict({part: nn.Linear(dim, dim) for part in PARTS})
        self.short = nn.ModuleDict({part: nn.Linear(dim, dim) for part in PARTS}) if alpha else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sources = [(self.long, self._mean(x, call), 1 - self.alpha)]
        if self.short is not None:
            sources.append((self.short, x, self.alpha))
        rows = {
            f"{part[0]}_{i}": self._split(branch[part](x))
            for i, (branch, _, _) in enumerate(sources)
            for part in PARTS[1:]
        }
        where, held = joined(call, x, self.causal, **rows)
        output, weights = torch.zeros_like(x), None
        for i, (branch, query, share) in enumerate(sources):
            q, (k, v) = self._split(branch["q_proj"](query)), held[2 * i : 2 * i + 2]
            mixed, weight = attend_where(q, k, v, where, scale=self.scale, need_weights=call.need_weights)
            output = output + share * mixed.transpose(1, 2).flatten(-2)
            if weight is not None:
                weights = share * weight if weights is None else weights + share * weight
        return Result(output, weights)

    def _mean(self, x: Tensor, call: Call) -> Tensor:
        """The mean of the last `window` real tokens up to each; the state holds what later tokens' means reach."""
        real = x.new_ones(*x.shape[:2], 1) if call.padding is None else call.padding[..., None].to(x.dtype)
        rows = torch.cat([x if call.padding is None else x.masked_fill(real == 0, 0.0), real], -1)
        back, state = self.window - 1, call.state
        tail = rows.new_zeros(len(x), back, rows.shape[-1]) if state is None else state.fixed.get("tail")
        rows = F.pad(rows, (0, 0, back, 0)) if tail is None else torch.cat([tail, rows], 1)
        if state is not None:
            state.fixed["tail"] = rows[:, rows.shape[1] - back :].clone()
        wide = torch.promote_types(x.dtype, torch.float32)
        total = rows.unfold(1, self.window, 1).sum(-1, dtype=wide)
        return (total[..., :-1] / total[..., -1:].clamp(min=1)).to(x.dtype)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def transition_loss(items: Tensor, counts: Tensor, heads: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Transition-aware embedding distillation: which items follow which is to be read off the embeddings themselves.

        mean over i of -sum_j softmax(counts_i / max_k counts_ik / T)_j log softmax(sqrt(e) items_i items^T / T)_j

    items [v, e]: the embedding table; counts [v, v]: how often item j came after item i; heads [any]: items of a batch,
    once for each time that they occur in it. The code's weight for it is 0.1, its T the default here; it drops features
    of items_i out, and so can the caller of what is given.
    """
    heads = heads.flatten()
    seen = counts[heads].to(items.dtype)
    wanted = (seen / seen.amax(-1, keepdim=True).clamp(min=1) / temperature).softmax(-1)
    found = (items[heads] * items.shape[-1] ** 0.5) @ items.mT / temperature
    return -(wanted * found.log_softmax(-1)).sum(-1).mean()
