"""Joint attention of MossFormer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary, rotate
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

ROTATED = 32  # features of q and k that are turned by position, at most


class _ConvModule(nn.Module):
    """h + depthwise(h) with h = silu(W norm(x)); padding is zero to the convolution."""

    def __init__(self, width: int, out: int, kernel_size: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, out)
        self.conv = nn.Conv1d(out, out, kernel_size, padding=kernel_size // 2, groups=out, bias=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        h = F.silu(self.linear(self.norm(x)))
        if real is not None:
            h = h.masked_fill(~real[..., None], 0.0)
        convolved: Tensor = self.conv(h.transpose(1, 2))
        return h + convolved.transpose(1, 2)


@register
class MossFormer(Mechanism):
    """Exact attention within chunks and linear attention over all, with one q and k, gating two value streams.

        v, u, z = C_v(x), C_u(x), C_z(x),   q, k, q', k' = rotate(gamma_s z + beta_s)
        A = relu(q k^T / chunk)^2 within a chunk + q' k'^T / n over all;   result C_o((A u) v sigmoid((A v) u))

    C: norm, linear, silu, and a depthwise convolution added to it. heads: 1 as published; more split v and u, with a
    gamma and beta each. The result is to be added to x. A last chunk may be shorter. Matrix: A. Dense masks are
    refused: convolutions cannot obey.

    Source: Zhao and Ma, MossFormer, arXiv:2302.11824, and the authors' released FLASH_ShareA_FFConvM, with n the number
    of real tokens; without dropout and without that code's shift of half of the features by one token, inherited from
    FLASH. Norms are layer norms, that class's default; the full model sets ScaleNorm.
    Weights: rows of the code's to_hidden are to_v's and then to_u's, whose norm is one; gamma and beta are of q, q', k,
    k' in this order, with an axis of heads.
    """

    card = Card(
        name="mossformer",
        title="MossFormer: Pushing the Performance Limit of Monaural Speech Separation using Gated Single-Head "
        "Transformer with Convolution-Augmented Joint Self-Attentions",
        reference="arXiv:2302.11824",
        family=Family.CONVOLUTION,
        patterns={"noncausal-self"},
        time="n chunk",
        state="",
        decodes=False,
        example={"chunk": 4, "query_dim": 6, "value_dim": 12, "kernel_size": 3},
        notes="one head as published; its convolutions look ahead, so that there is no causal form",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        chunk: int = 256,
        query_dim: int = 128,
        value_dim: int | None = None,
        kernel_size: int = 17,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        value_dim = 2 * dim if value_dim is None else value_dim
        if value_dim < 1 or value_dim % heads:
            raise ValueError(f"mossformer: value_dim={value_dim}; want a positive multiple of heads={heads}")
        if chunk < 1 or query_dim < 2 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"mossformer: chunk={chunk}, query_dim={query_dim}, kernel_size={kernel_size}; want chunk >= 1, "
                "query_dim >= 2 and an odd kernel_size, which looks as far ahead as back"
            )
        self.chunk = chunk
        self.rotary = Rotary(fraction=min(1.0, ROTATED / query_dim), interleaved=True)
        self.to_v, self.to_u = _ConvModule(dim, value_dim, kernel_size), _ConvModule(dim, value_dim, kernel_size)
        self.to_z = _ConvModule(dim, query_dim, kernel_size)
        self.to_out = _ConvModule(value_dim, dim, kernel_size)
        self.gamma = nn.Parameter(0.02 * torch.randn(4, heads, query_dim))
        self.beta = nn.Parameter(torch.zeros(4, heads, query_dim))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"mossformer: a dense mask of shape {tuple(call.dense.shape)} was given, which its convolutions cannot "
                "obey; give key padding [batch, n] as the mask"
            )
        real = call.padding
        v, u, z = (module(x, real) for module in (self.to_v, self.to_u, self.to_z))
        gamma, beta = (scale.flatten(0, 1)[:, None] for scale in (self.gamma, self.beta))
        turned = rotate(z[:, None] * gamma + beta, call.query_positions(x), self.rotary)
        q, far_q, k, far_k = turned.unflatten(1, (4, self.heads)).unbind(1)  # [b, h, n, d] each
        count = torch.full((1, 1, 1, 1), x.shape[1], dtype=x.dtype, device=x.device)
        if real is not None:
            k, far_k = (t.masked_fill(~real[:, None, :, None], 0.0) for t in (k, far_k))
            count = real.sum(1).clamp(min=1).to(x.dtype)[:, None, None, None]
        far_q = far_q / count
        both, weights = torch.cat([self._split(t) for t in (v, u)], -1), None
        if call.need_weights:
            chunks = torch.arange(x.shape[1], device=x.device) // self.chunk
            near = (q @ k.mT / self.chunk).relu().square()
            weights = torch.where(chunks[:, None] == chunks, near, 0.0) + far_q @ far_k.mT
            mixed = weights @ both
        else:
            mixed = self._near(q, k, both) + far_q @ (far_k.mT @ both)
        of_v, of_u = (t.transpose(1, 2).flatten(-2) for t in mixed.chunk(2, -1))
        output = self.to_out(of_u * v * (of_v * u).sigmoid(), real)
        return Result(output, weights)

    def _split(self, values: Tensor) -> Tensor:
        """[b, n, e] -> [b, h, n, e / h]"""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _near(self, q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        """relu(q k^T / chunk)^2 values within each chunk; what fills up the last one has keys of zero."""
        n, size = q.shape[2], min(self.chunk, q.shape[2])
        q, k, values = (F.pad(t, (0, 0, 0, -n % size)).unflatten(2, (-1, size)) for t in (q, k, values))
        return ((q @ k.mT / self.chunk).relu().square() @ values).flatten(2, 3)[:, :, :n]
