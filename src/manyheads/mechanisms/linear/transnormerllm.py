"""The attention block of TransNormerLLM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.kernelised import in_stretches, joined, read_self, shown
from manyheads.functional.linear import CHUNK, Kernel, checked_chunk, widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.mechanisms.linear.lightning import head_slopes, simple_rms_norm
from manyheads.registry import register


@register
class TransNormerLLM(Mechanism):
    """Gated linear attention that is told places twice: by a learned rotation (LRPE) and by a decay per head (-d).

        a_i = sum over j <= i of lambda^(i - j) sum_f q_if k_jf cos(theta_f (i - j)) v_j,  out = Wo (u * rms_norm(a))

    with q = silu(Wq x), k = silu(Wk x), v = Wv x, u = Wu x, no 1 / sqrt(d), a norm without weight over all heads at
    once in the denominator's place. theta [heads, d] is learned, at first 10000^(-2 f / dim) over all features. lambda
    = exp(-slope), slopes as in ALiBi times 1 - layer / (layers - 1), the last layer not decaying. lrpe: the paper
    rotates in the first layer only, and so does None, the default. State: the decayed sum of [k cos, k sin]_j v_j,
    2 d^2 numbers per head (d^2 without LRPE).
    Source: Qin et al., TransNormerLLM, arXiv:2307.14995. The paper writes lambda = exp(-8 h / H (1 - l / L)); ALiBi's
    slopes and L - 1 are the released model's, whose 1e-5 on the last layer is left out. i - j of the decay counts real
    tokens, that of the rotation is in positions. Without LRPE this is the mechanism `lightning`.
    Weights: qkvu_proj of the released model is q, k, v, u in this order.
    """

    card = Card(
        name="transnormerllm",
        title="Scaling TransNormer to 175 Billion Parameters",
        reference="arXiv:2307.14995",
        family=Family.LINEAR,
        patterns={"causal-self"},
        time="n",
        state="1",
        parallel="state",
        example={"chunk": 4},
        notes="Its weights are signed and do not sum to one. With a state, neither dense masks nor weights reach "
        "back to earlier passes. Slower to learn lookup than softmax: 88% on quick recall, 96% in five times "
        "the steps.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
        lrpe: bool | None = None,
        chunk: int = CHUNK,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if not 0 <= layer < layers:
            raise ValueError(f"{self.card.name}: layer={layer} of layers={layers}; want 0 <= layer < layers")
        self.head_dim = self._split_heads()
        self.chunk = checked_chunk(self.card.name, chunk)
        self.slopes = [slope * (1 - layer / max(layers - 1, 1)) for slope in head_slopes(heads)]
        self.q_proj, self.k_proj, self.v_proj, self.u_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=bias) for _ in range(5)
        )
        turns = (-2 * math.log(10000.0) / dim * torch.arange(dim, dtype=torch.float64)).exp()
        rotates = layer == 0 if lrpe is None else lrpe
        self.theta = nn.Parameter(turns.to(torch.get_default_dtype()).view(heads, -1)) if rotates else None

    def attend(self, x: Tensor, context: Tensor | None, call: Call) -> Result:
        long = in_stretches(self, x, call)
        if long is not None:
            return long
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        positions = call.query_positions(x)
        q, k = (self._placed(F.silu(widen(t)), positions) for t in (q, k))
        # Not a buffer: a module in bfloat16 would round it.
        slopes = torch.tensor(self.slopes, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        kernel = Kernel(floor=None)
        read = read_self(self.card.name, q, k, v, kernel, call, causal=True, slopes=slopes, chunk=self.chunk)
        if call.state is not None:
            call.state.advance(x.shape[1])
        normed = simple_rms_norm(joined(read.mixed, read.mixed)).to(x.dtype)
        return Result(self.o_proj(self.u_proj(x) * normed), shown(read.weights, call, x))

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        """[b, h, n, d] -> [x cos(theta t), x sin(theta t)], 2 d features."""
        if self.theta is None:
            return x
        angle = positions[:, None, :, None].to(x.dtype) * self.theta.to(x.dtype)[:, None]
        return torch.cat((x * angle.cos(), x * angle.sin()), -1)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
