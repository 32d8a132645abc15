"""ComplexFormer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class ComplexFormer(SoftmaxAttention):
    """Pairs of features are complex numbers; each head scales their difference in angle and adds the positions' own.

        score(m, n) = sum over pairs p of |q_mp| |k_np| cos(delta_hp (arg q_mp - arg k_np) + b_hp + (m - n) g_p),
        g_p = base^(-2p / d), |z| = sqrt(re^2 + im^2 + 1e-9), pairs (p, p + d/2);  delta, b: [heads, d/2], learned

    delta = 1 and b = 0 is rotary embedding. The cosine of a difference is a dot product of (cos, sin), so that queries
    and keys are turned once, keys are kept as usual, and PyTorch's kernel does the rest.
    Source: arXiv:2506.10222, and its code (ComplexMultiHeadAttentionV2), whence: no 1 / sqrt(d), and
    delta starts at N(0, 2 / d), not at 1. Unlike the code, which casts g to bfloat16, angles are at least float32.
    """

    shares_kv = False
    card = Card(
        name="complexformer",
        title="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector "
        "Attention",
        reference="arXiv:2506.10222",
        family=Family.POSITION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        parallel="ring",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, base: float = 10000.0, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if self.head_dim % 2:
            raise ValueError(
                f"complexformer: dim={dim} over heads={heads} gives {self.head_dim} features per head; want even"
            )
        if base <= 0:
            raise ValueError(f"complexformer: base={base} must be positive")
        self.base, self.scale = base, 1.0
        pairs = self.head_dim // 2
        self.delta = nn.Parameter(torch.randn(heads, pairs) * pairs**-0.5)
        self.angle_bias = nn.Parameter(torch.zeros(heads, pairs))

    def position(self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._turn(q, query_positions, self.angle_bias), self._turn(k, key_positions, None)

    def _turn(self, x: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        real, imaginary = x.to(wide).chunk(2, -1)
        size = (real.square() + imaginary.square() + 1e-9).sqrt()
        angle = torch.atan2(imaginary, real)
        pairs = real.shape[-1]
        speed = self.base ** -(torch.arange(pairs, device=x.device, dtype=wide) / pairs)
        angle = self.delta[:, None].to(wide) * angle + positions[:, None, :, None].to(wide) * speed
        if bias is not None:
            angle = angle + bias[:, None].to(wide)
        return torch.cat([size * angle.cos(), size * angle.sin()], -1).to(x.dtype)
