"""A transformer of a few thousand weights whose inside can be read, with the attention that a study asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.registry import create_attention
from manyheads.softmax import SoftmaxAttention


def _card(name: str, title: str, reference: str) -> Card:
    return Card(name=name, title=title, reference=reference, family=Family.SCORING, patterns={"causal-self"},
                time="n^2", state="n")  # fmt: skip


class ReluAttention(SoftmaxAttention):
    """relu(q_i . k_j / sqrt(d)) v_j, summed over j and not normalised: what arXiv:2410.13835 puts in softmax' place."""

    card = _card("relu", "ReLU attention, as used in a study", "arXiv:2410.13835")

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        weights = scores.relu()
        return weights if allowed is None else weights.masked_fill(~allowed, 0.0)


class SigmoidAttention(SoftmaxAttention):
    """sigmoid(q_i . k_j / sqrt(d)) v_j, summed over j and not normalised (arXiv:2410.10781, table 4)."""

    card = _card("sigmoid", "Sigmoid attention, as used in a study", "arXiv:2410.10781")

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        weights = scores.sigmoid()
        return weights if allowed is None else weights.masked_fill(~allowed, 0.0)


class KeyBiasAttention(SoftmaxAttention):
    """softmax over one more key k* per head, learned, whose value is zero: exp(q_i . k_j) / (exp(q_i . k*) + sum_j
    exp(q_i . k_j)), so that a row may sum to less than one (arXiv:2410.10781, table 4)."""

    card = _card("key-bias", "Softmax attention with a key bias, as used in a study", "arXiv:2410.10781")

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.extra = nn.Parameter(torch.zeros(heads, dim // heads, 1))

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Any) -> None:
        return None

    def weigh(self, q: Tensor, k: Tensor, where: Any) -> Tensor:
        allowed = self.select(q, k, where)
        scores = self.score(q, k, where)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        return torch.cat([q * self.scale @ self.extra, scores], -1).softmax(-1)[..., 1:]


KINDS = {"key-bias": KeyBiasAttention, "relu": ReluAttention, "sigmoid": SigmoidAttention}


def causal_attention(kind: str, dim: int, heads: int, **config: Any) -> Any:
    """`relu`, `sigmoid` and `key-bias` of this file, anything else from the registry."""
    if kind in KINDS:
        return KINDS[kind](dim, heads, causal=True, **config)
    return create_attention(kind, dim, heads, causal=True, **config)


@dataclass(frozen=True)
class Look:
    """One layer's inside. weights: [b, h, n, n] as they are applied. values: [b, h, n, d]. residual: [b, n, e] after
    the layer."""

    weights: Tensor
    values: Tensor
    residual: Tensor


class Layer(nn.Module):
    def __init__(self, kind: str, dim: int, heads: int, rotary: bool) -> None:
        super().__init__()
        config: dict[str, Any] = {"rotary": {}} if rotary else {}
        self.attention = causal_attention(kind, dim, heads, **config)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, looks: list[Look] | None) -> Tensor:
        inside = self.norms[0](x)
        found = self.attention(inside, need_weights=looks is not None)
        x = x + found.output
        x = x + self.mlp(self.norms[1](x))
        if looks is not None:
            values = self.attention.v_proj(inside).unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
            looks.append(Look(found.weights, values, x))
        return x


class TinyTransformer(nn.Module):
    """Pre-norm decoder: tokens [b, n] -> logits [b, n, vocab]. Positions are learned, or rotary in every layer."""

    def __init__(
        self, vocab: int, length: int, *, kind: str = "softmax", dim: int, heads: int, layers: int, rotary: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.places = None if rotary else nn.Embedding(length, dim)
        self.layers = nn.ModuleList(Layer(kind, dim, heads, rotary) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        for table in (self.embed, self.places):
            if table is not None:
                nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens: Tensor, looks: list[Look] | None = None) -> Tensor:
        """looks: a list that is filled with a Look per layer."""
        x = self.embed(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x, looks)
        return self.head(self.norm(x))


def shares(weights: Tensor) -> Tensor:
    """|w| over the sum of a row: weights themselves for softmax, the proxy of arXiv:2410.10781 for attention that is
    not normalised; a row of zeros stays zero."""
    size = weights.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(1e-8)
