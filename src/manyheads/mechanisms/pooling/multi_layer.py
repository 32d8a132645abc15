"""Multi-layers trainable pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.precision import unit
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

OVER = ("last", "mean")


@register
class MultiLayerPooling(Mechanism):
    """Learned queries read one vector per layer of a model, so that an embedding is not of the last layer alone.

        z = L + W_o softmax(W_q LN(L) (W_k LN(x'))^T / sqrt(d)) W_v LN(x'),   x'_t = x_t + e_t
        y = normalised mean over the queries of z + W_2 (gelu gate)(W_1 LN(z))

    x_t: layer t of the sequence in one vector, of its last real token (over="last", the paper's EOS pooling, which
    wants causal layers below) or the mean over real tokens ("mean"). x [b, n, dim] is the last layer's states, earlier
    [b, n, layers below, dim] those of the layers under it, first layer first -> [b, dim] of length 1. A classifier
    gives its pooling the outputs of all its layers, and not the embeddings. L: `latents` learned queries; e: a learned
    vector for each of at most `layers` layers. weights [b, heads, 1, n] say which tokens are read; `layer_weights` of
    which layer, means over the queries (of attention alone: the queries themselves pass as well).

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
        example={"layers": 3, "latents": 3, "over": "mean"},
        takes={"earlier": "[b, n, layers, dim], the outputs of all layers below"},
        notes="`layers` is the most layers of a model that it can read",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        layers: int = 64,
        latents: int = 64,
        expand: int = 4,
        over: str = "last",
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if layers < 1 or latents < 1 or expand < 1:
            raise ValueError(
                f"multi-layer-pooling: layers={layers}, latents={latents}, expand={expand} must be positive"
            )
        if over not in OVER:
            raise ValueError(f"multi-layer-pooling: over={over!r}; want one of {list(OVER)}")
        self.layers, self.over = layers, over
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
        shares = self._shares(x, call.padding)
        weights, v = self._weigh(self._layers(x, call.inputs["earlier"], shares))
        z = self.latents + self.o_proj((weights @ v).transpose(1, 2).flatten(-2))
        value, gate = self.ff_in(self.norm_ff(z)).chunk(2, -1)
        pooled = (z + self.ff_out(value * F.gelu(gate))).mean(1)
        tokens = shares[:, None, None].expand(-1, self.heads, -1, -1).contiguous() if call.need_weights else None
        return Result(unit(pooled), tokens)

    def layer_weights(self, x: Tensor, earlier: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """How much is read of each layer, [b, heads, layers]; mask: key padding [b, n]."""
        return self._weigh(self._layers(x, earlier, self._shares(x, mask)))[0].mean(2)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        below = self.layers - 1
        return {"earlier": torch.sin(torch.arange(n * below * self.dim) * 0.7).view(1, n, below, self.dim)}

    def _shares(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """What part each token has in the vector of its sequence, [b, n]; zeros where none is real."""
        real = torch.ones(x.shape[:2], device=x.device) if padding is None else padding.float()
        if self.over == "last":
            place = real * torch.arange(1, x.shape[1] + 1, device=x.device)
            real = real * (place == place.amax(1, keepdim=True))
        return (real / real.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)

    def _layers(self, x: Tensor, earlier: Any, shares: Tensor) -> Tensor:
        """[b, layers, dim], the last layer's last."""
        fits = isinstance(earlier, Tensor) and earlier.ndim == 4 and earlier.device == x.device
        if not fits or earlier.shape[:2] != x.shape[:2] or earlier.shape[3] != self.dim:
            what = f"{list(earlier.shape)} on {earlier.device}" if isinstance(earlier, Tensor) else repr(earlier)[:80]
            wanted = f"[{x.shape[0]}, {x.shape[1]}, layers below, {self.dim}] on {x.device}"
            raise ValueError(f"multi-layer-pooling: earlier is {what}; want {wanted}")
        if earlier.shape[2] >= self.layers:
            raise ValueError(
                f"multi-layer-pooling: {earlier.shape[2] + 1} layers, the last among them, and the module was built "
                f"for {self.layers}; build it with a larger `layers`"
            )
        states = torch.cat([earlier, x[:, :, None]], 2)
        states = states.masked_fill((shares == 0)[:, :, None, None], 0.0)
        return torch.einsum("bn,bnle->ble", shares, states)

    def _weigh(self, layers: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [b, heads, latents, layers] and values [b, heads, layers, d]."""
        held = self.norm_layers(layers + self.place(torch.arange(layers.shape[1], device=layers.device)))
        q = self._heads(self.q_proj(self.norm_latents(self.latents))[None])
        k, v = self._heads(self.k_proj(held)), self._heads(self.v_proj(held))
        return masked_softmax(q * self.head_dim**-0.5 @ k.transpose(-1, -2), None), v

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
