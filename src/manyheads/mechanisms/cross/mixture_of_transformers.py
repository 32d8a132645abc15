"""Mixture-of-Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kinds import checked_kinds
from manyheads.functional.rotary import Rotary
from manyheads.functional.routing import grouped_linear
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention

EPS = 1e-5


@register
class MixtureOfTransformers(SoftmaxAttention):
    """One attention over a mixed sequence, with the projections of each token's own modality m(i).

        q_i, k_i, v_i = W_q^m(i) x_i, W_k^m(i) x_i, W_v^m(i) x_i;  a = softmax(q k^T / sqrt(d)) v over all tokens
        out_i = norm^m(i)(W_o^m(i) a_i)

    token_kinds [b, n]: m(i), the modality of each token of this pass, 0 to modalities - 1; of padding it may be
    anything. Each token costs what it costs in a model with one modality. norm: RMS norm with gains per modality, after
    W_o. qk_norm: the same on q and k, per head.

    Source: Liang et al., Mixture-of-Transformers, arXiv:2411.04996, and its released example code, which norms after
    W_o; norm=False leaves norms to the surrounding block. Its feed-forward layers per modality are a model's
    by_kind=["mlp"].
    Weights: qkv[m] is wq, wk, wv of modality m side by side, each transposed; out[m] is its wo transposed; qk_norm is
    [q's, k's].
    """

    card = Card(
        name="mixture-of-transformers",
        title="Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation Models",
        reference="arXiv:2411.04996",
        family=Family.CROSS,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"modalities": 3, "qk_norm": True},
        takes={"token_kinds": "[b, n] integers, the modality of each token"},
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        modalities: int = 2,
        norm: bool = True,
        qk_norm: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        if modalities < 2:
            raise ValueError(f"mixture-of-transformers: modalities={modalities}; want at least 2 (for one: 'softmax')")
        super().__init__(dim, heads, causal=causal, rotary=rotary)
        del self.q_proj, self.k_proj, self.v_proj, self.o_proj
        self.modalities = modalities
        self.qkv = nn.Parameter(torch.empty(modalities, dim, 3 * dim))
        self.out = nn.Parameter(torch.empty(modalities, dim, dim))
        for weight in (self.qkv, self.out):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)  # as nn.Linear does
        self.norm = nn.Parameter(torch.ones(modalities, dim)) if norm else None
        self.qk_norm = nn.Parameter(torch.ones(2, modalities, self.head_dim)) if qk_norm else None

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"token_kinds": torch.arange(n)[None] % self.modalities}

    def projected(self, x: Tensor, source: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        kind = self._kinds(x, call)
        q, k, v = self._own(x, kind, self.qkv).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        if self.qk_norm is not None:
            gains = self.qk_norm[:, kind][:, :, :, None]  # [2, b, n, 1, d]
            q, k = (F.rms_norm(t, (self.head_dim,), eps=EPS) * gain for t, gain in ((q, gains[0]), (k, gains[1])))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        kind = self._kinds(x, call)
        output = self._own(mixed.transpose(1, 2).flatten(-2), kind, self.out)
        if self.norm is not None:
            output = F.rms_norm(output, (output.shape[-1],), eps=EPS) * self.norm[kind]
        return output, {}

    def _kinds(self, x: Tensor, call: Call) -> Tensor:
        return checked_kinds(self.card.name, call.inputs["token_kinds"], x, call.padding, self.modalities)

    def _own(self, rows: Tensor, kind: Tensor, weight: Tensor) -> Tensor:
        """rows [b, n, in] times the matrix of their modality, weight [modalities, in, out] -> [b, n, out]."""
        return grouped_linear(rows.flatten(0, 1), kind.flatten(), weight).unflatten(0, rows.shape[:2])
