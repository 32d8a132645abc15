"""Scale-adaptive self-attention, of SparseBEV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

ROWS = 512  # queries whose scores and distances stand in memory at once


@register
class ScaleAdaptive(Mechanism):
    """Each query says, per head, how fast its attention falls off with distance in the plane.

        softmax_j(q_i . k_j / sqrt(d) - tau_ih |p_i - p_j|) v_j,   tau_i = W x_i + b, one number per head

    places: p, [b, n, 2] or more coordinates, centres of boxes in metres seen from above; no gradient goes to them. tau
    may be negative: nothing keeps it from it. It starts at b, evenly from 0 to 2 over heads at random, and W = 0.
    tau = 0 is plain attention; a large one leaves each query to itself.

    Source: Liu et al., SparseBEV, arXiv:2308.09244, and its released SparseBEVSelfAttention, where positions were added
    to x before, and x is added to the output after (both are the model's here). Without dropout.
    Weights: gen_tau is tau; attention.attn.in_proj is q, k, v in this order.
    """

    card = Card(
        name="scale-adaptive",
        title="SparseBEV: High-Performance Sparse 3D Object Detection from Multi-Camera Videos",
        reference="arXiv:2308.09244",
        family=Family.POSITION,
        patterns={"noncausal-self"},
        time="n^2",
        state="",
        decodes=False,
        takes={"places": "[b, n, 2] floats, where each token is in the plane"},
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.attention = Heads(dim, heads, bias)
        self.tau = nn.Linear(dim, heads)
        nn.init.zeros_(self.tau.weight)
        nn.init.uniform_(self.tau.bias, 0.0, 2.0)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        turn = torch.arange(n)
        return {"places": torch.stack([(0.7 * turn).sin(), (1.3 * turn).cos()], -1)[None]}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        places = self._checked(x, call.inputs["places"])
        allowed = call.dense
        if call.padding is not None:
            allowed = key_mask(call.padding)
            places = places.masked_fill(~call.padding[..., None], 0.0)
        heads = self.attention
        q, (k, v) = heads.split(heads.q_proj(x)) * heads.scale, heads.read(x)
        tau, parts, weights = self.tau(x).transpose(1, 2)[..., None], [], []
        for start in range(0, x.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            far = (places[:, rows, None] - places[:, None]).square().sum(-1).sqrt()[:, None]
            scores = grouped_scores(q[:, :, rows], k)
            scores = scores - tau[:, :, rows] * far.to(scores.dtype)
            shown = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, rows]
            weight = masked_softmax(scores, shown)
            parts.append(grouped_mix(weight.to(v.dtype), v))
            weights.append(weight if call.need_weights else None)
        matrix = torch.cat(weights, 2) if call.need_weights else None  # type: ignore[arg-type]
        return Result(heads.join(torch.cat(parts, 2)), matrix)

    def _checked(self, x: Tensor, places: Any) -> Tensor:
        fits = isinstance(places, Tensor) and places.is_floating_point() and places.device == x.device
        if not fits or places.ndim != 3 or places.shape[:2] != x.shape[:2]:
            given = list(places.shape) if isinstance(places, Tensor) else type(places).__name__
            raise ValueError(f"scale-adaptive: places are {given}; want floats {[*x.shape[:2], 2]} on {x.device}")
        return places.detach().to(torch.promote_types(places.dtype, torch.float32))
