"""Multi-layers trainable pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.precision import unit
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class MultiLayerPooling(Mechanism):
    """Learned queries read one vector per layer of a model, so that an embedding is not of the last layer alone.

        z = L + W_o softmax(W_q LN(L) (W_k LN(x'))^T / sqrt(d)) W_v LN(x'),   x'_t = x_t + e_t
        y = normalised mean over the queries of z + W_2 (gelu gate)(W_1 LN(z))

    x: [b, layers, dim], the sequence pooled layer by layer (its last token's states, or their means), first layer
    first -> [b, dim] of length 1. L: `latents` learned queries; e: a learned vector for each of `layers` places.
    weights [b, heads, 1, n] are means over the queries (of attention alone: the queries themselves pass as well).

    Source: Tang and Yang, Pooling and Attention: What Are Effective Designs for LLM-Based Embedding Models?,
    arXiv:2409.02727, and its released MultiLayersTrainablePooling.py, whose heads are wider than dim / heads and whose
    latents are 768.
    """

    card = Card(
        name="multi-layer-pooling",
        title="Pooling and Attention: What Are Effective Designs for LLM-Based Embedding Models?",
        reference="arXiv:2409.02727",
        family=Family.POOLING,
        patterns={"pool"},
        time="n",
        state="",
        decodes=False,
        example={"layers": 80, "latents": 3},
        inputs={"earlier": "the sequence pooled at every layer, [b, layers, dim], in place of tokens"},
        notes="the tokens are the layers of a model, at most `layers` of them",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, layers: int = 64, latents: int = 64, expand: int = 4
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if layers < 1 or latents < 1 or expand < 1:
            raise ValueError(
                f"multi-layer-pooling: layers={layers}, latents={latents}, expand={expand} must be positive"
            )
        self.layers = layers
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.place = nn.Embedding(layers, dim)
        self.norm_latents, self.norm_layers, self.norm_ff = (nn.LayerNorm(dim) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.ff_in = nn.Linear(dim, 2 * expand * dim)
        self.ff_out = nn.Linear(expand * dim, dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "multi-layer-pooling pools x into one vector: a dense mask was not expected; give key padding "
                "[batch, n] as the mask"
            )
        if x.shape[1] > self.layers:
            raise ValueError(
                f"multi-layer-pooling: x has {x.shape[1]} layers, the module was built for {self.layers}"
                "; build it with a larger `layers`"
            )
        allowed = None
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
            allowed = call.padding[:, None, None]
        held = self.norm_layers(x + self.place(torch.arange(x.shape[1], device=x.device)))
        q = self._heads(self.q_proj(self.norm_latents(self.latents))[None])
        k, v = self._heads(self.k_proj(held)), self._heads(self.v_proj(held))
        weights = masked_softmax(q * self.head_dim**-0.5 @ k.transpose(-1, -2), allowed)
        z = self.latents + self.o_proj((weights @ v).transpose(1, 2).flatten(-2))
        value, gate = self.ff_in(self.norm_ff(z)).chunk(2, -1)
        pooled = (z + self.ff_out(value * F.gelu(gate))).mean(1)
        return Result(unit(pooled), weights.mean(2, keepdim=True) if call.need_weights else None)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
