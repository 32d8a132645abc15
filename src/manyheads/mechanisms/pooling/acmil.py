"""ACMIL: gated attention pooling in several branches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.drawing import draw, highest
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Acmil(Mechanism):
    """Several gated attentions pool a bag of instances, kept apart by a loss and kept from resting on a few instances.

        h = relu(W x);   a_k = softmax over i of w_k . (tanh(V h_i) * sigmoid(U h_i));   y = sum_i (mean_k a_ki) h_i

    heads: the branches k. In training, of the `top` highest scores of each branch the share `drop`, drawn anew, is
    left out before the softmax. losses["diversity"]: mean cosine of the weights of two branches. x: [b, n, dim] ->
    [b, dim]; weights: [b, heads, 1, n]. The label loss of each branch reads `weights[:, :, 0] @ instances(x)`.
    One branch with drop=0 is the gated attention of Ilse et al., arXiv:1802.04712.

    Source: Zhang et al., Attention-Challenging Multiple Instance Learning, arXiv:2311.07125, and its released ACMIL_GA
    (MIT). Left out: the bias of w_k, which softmax cancels. Padded instances are never among the highest.
    Weights: tanh_proj, gate_proj, branches are attention_V.0, attention_U.0, attention_weights without its bias.
    """

    card = Card(
        name="acmil",
        title="Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification",
        reference="arXiv:2311.07125",
        family=Family.POOLING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        example={"hidden": 8, "top": 4},
        notes="instances have no order; in training the same bag pools differently every time",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, hidden: int = 128, top: int = 10, drop: float = 0.6
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if hidden < 1 or top < 0 or not 0 <= drop < 1:
            raise ValueError(
                f"acmil: hidden={hidden}, top={top}, drop={drop}; want hidden >= 1, top >= 0, drop in [0, 1)"
            )
        self.top, self.drop = top, drop
        self.reduce = nn.Linear(dim, dim, bias=False)
        self.tanh_proj = nn.Linear(dim, hidden)
        self.gate_proj = nn.Linear(dim, hidden)
        self.branches = nn.Linear(hidden, heads, bias=False)

    def instances(self, x: Tensor) -> Tensor:
        """h, what the branches weigh: [b, n, dim]."""
        return torch.relu(self.reduce(x))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "acmil pools x into one vector: a dense mask was not expected; give key padding [batch, n] as the mask"
            )
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
        h = self.instances(x)
        scores = self.branches(torch.tanh(self.tanh_proj(h)) * torch.sigmoid(self.gate_proj(h))).transpose(1, 2)
        allowed = None if call.padding is None else call.padding[:, None].expand_as(scores)
        if self.training and self.top and self.drop:
            allowed = self._drop(scores, torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed)
        weights = masked_softmax(scores, allowed)
        pooled = (weights.mean(1, keepdim=True) @ h)[:, 0]
        return Result(pooled, weights[:, :, None] if call.need_weights else None, {"diversity": _alike(weights)})

    def _drop(self, scores: Tensor, allowed: Tensor) -> Tensor:
        top = allowed.sum(-1).clamp_max(self.top)
        chosen = highest(scores.detach(), allowed, top)
        return allowed & ~draw(chosen, (top * self.drop + 1e-6).long())


def _alike(weights: Tensor) -> Tensor:
    """Mean cosine over pairs of branches and the bags that have an instance, [b, k, n] -> scalar; 0 for one branch."""
    k = weights.shape[1]
    unit = F.normalize(weights, dim=-1)
    pairs = (unit @ unit.transpose(1, 2)).triu(1).sum((1, 2)) / max(1, k * (k - 1) // 2)
    return pairs.sum() / (weights != 0).flatten(1).any(1).sum().clamp_min(1)
