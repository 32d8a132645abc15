"""BAM: a soft mixture of attention experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class Bam(SoftmaxAttention):
    """Whole multi-head attentions, each once the attention of a model of its own, weighed per token by a router.

        out = sum_e g_e (W_o^e concat_h head_h^e + b_o^e),  g = softmax(W_g x) over all experts

    None is left out: it is one attention of all experts' heads with a gate on each head. Experts that are all the same
    are one of them, whatever the router.
    heads: of all experts together; each has heads / experts of them and is as wide as the model: head_dim is
    dim experts / heads, unless the shell says. share_kv: keys and values are those of one expert, read by all (one
    cache); else each has its own. kv_heads: of all experts together, or of the one; as many as query heads by default.
    Weights returned are those of the heads, without gates.
    Source: Zhang et al., BAM! Just Like That, arXiv:2408.08274; no code of the authors was found. There, attention and
    the feed-forward experts stand side by side in a block; here the block is left as it is.
    Weights: heads of an expert lie together, expert after expert; with share_kv, the heads of all experts that read one
    key/value head lie together, in them expert after expert.
    """

    card = Card(
        name="bam",
        title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
        reference="arXiv:2408.08274",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"experts": 2, "share_kv": True},
        notes="All experts run. With keys and values of their own, there is a cache for each of them.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        experts: int = 2,
        share_kv: bool = False,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        if experts < 1 or heads % experts:
            raise ValueError(f"bam: heads={heads} are those of all experts together; want a multiple of {experts=}")
        shell = self.shell
        if shell.qk_norm == "whole":
            raise ValueError("bam: qk_norm='whole' would norm over the heads of all experts; want 'head' or None")
        if shell.head_dim is None and dim * experts % heads:
            raise ValueError(f"bam: dim={dim} is not divisible by the {heads // experts} heads of an expert")
        self.__dict__["shell"] = replace(shell, head_dim=shell.head_dim or dim * experts // heads)
        own = kv_heads if kv_heads is not None else shell.kv_heads
        own = (heads // experts if share_kv else heads) if own is None else own
        super().__init__(dim, heads, causal=causal, kv_heads=own, bias=bias, rotary=rotary)
        groups = self.kv_heads if share_kv else experts
        if heads % (groups * experts if share_kv else groups) or (not share_kv and self.kv_heads % experts):
            raise ValueError(
                f"bam: kv_heads={self.kv_heads} {'of one expert' if share_kv else 'of all experts'} do not divide "
                f"evenly among heads={heads} of {experts} experts"
            )
        self.experts, self.share_kv = experts, share_kv
        self.router = nn.Linear(dim, experts, bias=False)
        self.o_bias: nn.Parameter | None = None
        if self.o_proj.bias is not None:
            self.o_bias = nn.Parameter(self.o_proj.bias.detach().repeat(experts, 1))
            self.o_proj.register_parameter("bias", None)

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = self.router(x)
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(mixed.dtype)
        gates = shares[..., self.expert_of_head(x.device)]  # [b, n, h]
        out = self.o_proj((mixed.transpose(1, 2) * gates[..., None]).flatten(-2))
        return (out if self.o_bias is None else out + shares @ self.o_bias), {}

    def expert_of_head(self, device: torch.device | None = None) -> Tensor:
        """[heads]: whose each head is."""
        groups = self.kv_heads if self.share_kv else 1
        each = torch.arange(self.experts, device=device).repeat_interleave(self.heads // (self.experts * groups))
        return each.repeat(groups)
