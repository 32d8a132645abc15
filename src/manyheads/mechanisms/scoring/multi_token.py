"""Multi-Token Attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.layers import RMSNorm
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class MultiToken(SoftmaxAttention):
    """Convolutions over queries, keys and heads let one weight depend on several pairs of tokens.

        S = conv(mask_0(q k^T / sqrt(d))), A = softmax(mask_-inf(S)), A = mask_0(conv'(A)) (optional), A = mix(A),
        out = W_o (1 - lambda_init) RMSNorm(A v),  conv(S)_ij = sum over a < c_q, b < c_k of
        theta[c_q - 1 - a, b] S[i - a, j + b - c_k // 2] per head,  mix(A)_c = sum_b A_b K[b, c] in groups of heads.

    query_kernel, key_kernel: c_q, c_k of conv; post_*: those of conv' (0: none); head_kernel: heads per group (None: 2
    where that divides). All start as the identity. The norm's weight [d] is shared by the heads; gate: the result is
    multiplied by sigmoid of a linear map of itself, as the released configurations do.

    Source: Golovneva et al., arXiv:2504.00927, and its code, without the code's option to mix heads before the softmax.
    Masked pairs, and tokens that are padding, count as zero in both convolutions. Without causality (not in the paper)
    the kernel still reads only earlier queries. The paper's lambda_init is 0.8 - 0.6 exp(-0.3 layer).
    """

    card = Card(
        name="multi-token",
        title="Multi-Token Attention",
        reference="arXiv:2504.00927",
        family=Family.SCORING,
        patterns={"noncausal-self", "causal-self"},
        time="n^2 query_kernel key_kernel",
        state="n",
        example={"query_kernel": 3, "key_kernel": 5, "post_query_kernel": 2, "post_key_kernel": 3, "gate": True},
        notes="the state keeps the last queries too; with a state, a dense mask is refused",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        query_kernel: int = 6,
        key_kernel: int = 11,
        post_query_kernel: int = 0,
        post_key_kernel: int = 0,
        head_kernel: int | None = None,
        lambda_init: float = 0.0,
        gate: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        group = (1 if heads % 2 else 2) if head_kernel is None else head_kernel
        if group < 1 or heads % group:
            raise ValueError(f"multi-token: head_kernel={head_kernel} does not divide heads={heads}")
        self.kernel = self._identity(query_kernel, key_kernel)
        post = post_query_kernel or post_key_kernel
        self.post_kernel = self._identity(post_query_kernel, post_key_kernel) if post else None
        self.head_mixing = nn.Parameter(torch.eye(group).repeat(heads // group, 1, 1))
        self.norm = RMSNorm(self.head_dim, eps=1e-5)
        self.gate = nn.Linear(self.head_dim, 1) if gate else None
        self.keep = 1.0 - lambda_init
        # Rows of scores before the first query that its weights depend on, through one convolution or both.
        self.lookback = query_kernel - 1 + (post_query_kernel - 1 if post else 0)

    def _identity(self, rows: int, columns: int) -> nn.Parameter:
        if rows < 1 or columns < 1 or columns % 2 == 0:
            raise ValueError(
                f"multi-token: a kernel of {rows} queries by {columns} keys; want at least one query, and an odd "
                "number of keys, so that the key itself is in the middle"
            )
        kernel = torch.zeros(self.heads, 1, rows, columns)
        kernel[:, :, -1, columns // 2] = 1.0
        return nn.Parameter(kernel)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, allowed = self._window(x, call)
        scores = grouped_scores(q * self.scale, k).masked_fill(~allowed, 0.0)
        scores = _convolve(scores, self.kernel)
        allowed = allowed[:, :, -scores.shape[2] :]
        weights = masked_softmax(scores, allowed)
        if self.post_kernel is not None:
            weights = _convolve(weights, self.post_kernel)
            weights = weights.masked_fill(~allowed[:, :, -weights.shape[2] :], 0.0)
        weights = self._mix_heads(weights)
        if call.dense is not None:
            # A mask per head forbids a key to that head, though another head of its group may see it.
            weights = weights.masked_fill(~allowed[:, :, -weights.shape[2] :], 0.0)
        seen = allowed[:, :, -weights.shape[2] :]
        mixed = self.offered(q[:, :, -weights.shape[2] :], k, v, grouped_mix(weights, v), weights, seen)
        mixed = self.norm(mixed) * self.keep
        if self.gate is not None:
            mixed = mixed * self.gate(mixed).sigmoid()
        output, _ = self.output(mixed, x, call)
        return Result(output, weights if call.need_weights else None)

    def _mix_heads(self, weights: Tensor) -> Tensor:
        groups = weights.unflatten(1, self.head_mixing.shape[:2])
        return torch.einsum("bgcnm,gcd->bgdnm", groups, self.head_mixing).flatten(1, 2)

    def _window(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q with `lookback` earlier queries before it, all k and v, and which pairs are real [b or 1, 1 or h, rows, m].
        Queries before the first token are zero."""
        positions, state, n = call.query_positions(x), call.state, x.shape[1]
        q, k, v = self.project(x, x)
        q, k = self.position(q, k, positions, positions)
        padding, m = call.padding, call.seen + n
        held = q.new_zeros(*q.shape[:2], self.lookback, q.shape[3])
        if state is not None:
            if call.dense is not None:
                raise ValueError(
                    "multi-token: a dense mask was given with a state; its convolutions reach back to earlier queries, "
                    "whose masks the state does not hold: give a padding mask [batch, n], or make one parallel pass"
                )
            padding = state.append_optional("padding", padding, torch.ones(1, m, dtype=torch.bool, device=x.device))
            k, v, held = state.append("keys", k), state.append("values", v), state.fixed.get("queries", held)
        q = torch.cat([held, q], 2)
        if state is not None:
            state.fixed["queries"] = q[:, :, n:].clone()
            state.advance(n)
        return q, k, v, self._real(m, n, padding, call.dense, x.device)

    def _real(self, m: int, n: int, padding: Tensor | None, dense: Tensor | None, device: torch.device) -> Tensor:
        j = torch.arange(m, device=device)
        i = torch.arange(m - n - self.lookback, m, device=device)
        real = (i >= 0)[:, None].expand(-1, m)
        if self.causal:
            real = real & (j <= i[:, None])
        real = real[None, None]
        if padding is not None:
            rows = F.pad(padding, (self.lookback, 0))[:, m - n :]
            real = real & padding[:, None, None, :] & rows[:, None, :, None]
        return real if dense is None else real & F.pad(dense, (0, 0, self.lookback, 0))


def _convolve(scores: Tensor, kernel: Tensor) -> Tensor:
    """scores [b, h, rows, m], kernel [h, 1, c_q, c_k] -> [b, h, rows - c_q + 1, m], a kernel to each head."""
    return F.conv2d(scores, kernel, padding=(0, kernel.shape[3] // 2), groups=kernel.shape[0])
