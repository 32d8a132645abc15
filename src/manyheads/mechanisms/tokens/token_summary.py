"""Attention over summaries of patch tokens (MULTI-LANE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class TokenSummary(Mechanism):
    """Selectors sum up many patches into few tokens, and attention is paid among these alone, with learned prompts.

        s_i = sum_j softmax_j(x_i . c_j / sqrt(dim)) c_j  for i >= 1;  y = MSA with queries Z = [x_0, s_1 ..] and
        keys and values [prompts; Z]

    x: [class token, selectors], [b, n, dim]; context c: the patches, [b, m, dim]. prompts: learned keys and values
    before those of Z. Selectors meet patches as they are, without projections or heads.
    Matrix: over the patches, through the summaries; what the class token and the prompts take is beside them.
    Source: De Min et al., Less is more, arXiv:2405.15633, and its code, where this is one lane: a lane per task shares
    the projections and has its own selectors and prompts, the patches are detached and go their own frozen way, and
    selectors pass to the next layer as they are (take x[:, 1:] for that).
    """

    card = Card(
        name="token-summary",
        title="Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
        reference="arXiv:2405.15633",
        family=Family.TOKENS,
        patterns={"noncausal-cross"},
        time="n m",
        state="",
        decodes=False,
        example={"prompts": 3},
        notes="no causal form: the summaries are queries of each other",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, prompts: int = 8, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if prompts < 0:
            raise ValueError(f"token-summary: prompts={prompts} must not be negative")
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        shape = (2, heads, prompts, self.head_dim)
        self.prompts = nn.Parameter(torch.empty(shape).uniform_(-1, 1)) if prompts else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "token-summary: a dense mask was given, but queries meet patches only in summaries; give key padding "
                "[batch, m] as the mask"
            )
        allowed = None if call.padding is None else call.padding[:, None]
        gather = masked_softmax(x[:, 1:] * self.dim**-0.5 @ context.mT, allowed)
        tokens = torch.cat((x[:, :1], gather @ context), 1)
        q, k, v = (self._heads(p(tokens)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.prompts is not None:
            k, v = (torch.cat((p.expand(len(x), -1, -1, -1), t), 2) for p, t in zip(self.prompts, (k, v), strict=True))
        mixed, weights = attend_weighted(q, k, v, None, scale=self.head_dim**-0.5, need_weights=call.need_weights)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if weights is None:
            return Result(output)
        first = weights.shape[-1] - x.shape[1] + 1
        return Result(output, weights[..., first:] @ gather[:, None])

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
