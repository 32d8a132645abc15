"""Modality-mutual attention, of AKI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_rows, grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.marked import content_width, split_kinds, unmarked
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention

KINDS = 3
IMAGE, QUESTION = 0, 1


@register
class ModalityMutual(SoftmaxAttention):
    """Causal attention in which image tokens also see the question that comes after them.

        softmax over j <= i, or j a question token where i is an image token, of (q_i . k_j / sqrt(d)), times v_j

    No parameter is added. Image tokens stay causal among themselves, and the answer is causal. x: the last three
    features of a token say what it is, the largest wins: (image, question, other). They are not attended with, and the
    output is zero there. Heads share the dim - 3 others, rounded down to a multiple of heads.

    An image token is changed by a later question, so that the pattern is noncausal, and one pass must hold image and
    question. Where the answer follows in a causal model, the image and question are its prefix.
    Source: Wang et al., Seeing is Understanding, arXiv:2503.02597, and the released `_make_modality_mutual_mask`, whose
    question ends at a token of its chat template.
    """

    card = Card(
        name="modality-mutual",
        title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
        reference="arXiv:2503.02597",
        family=Family.CROSS,
        patterns={"noncausal-self"},
        time="n^2",
        state="",
        decodes=False,
        inputs={"kinds": "whether a token is of the image, of the question or of neither, [b, n]"},
        notes="the last three features of x mark what each token is",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        kv_heads: int | None = None,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        width, inner = content_width("modality-mutual", dim, heads, KINDS, "(image, question, other)")
        super().__init__(inner, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        shared = self.kv_heads * self.head_dim
        self.q_proj, self.o_proj = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(width, shared, bias=bias) for _ in range(2))
        self.dim = dim

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        content, _ = split_kinds(x, KINDS)
        return super().project(content, content)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, where = self._read(x, context, call)
        _, kind = split_kinds(x, KINDS)
        image, question = kind == IMAGE, kind == QUESTION

        def allowed(rows: slice) -> Tensor:
            mutual = image[:, rows, None] & question[:, None, :]
            seen = ((where.j <= where.i[rows, None]) | mutual)[:, None]
            given = where.rows(rows).allowed()
            return seen if given is None else seen & given

        weights = None
        if call.need_weights:
            weights = masked_softmax(grouped_scores(q * self.scale, k), allowed(slice(None)))
            mixed = grouped_mix(weights, v)
        else:
            mixed = attend_rows(q, k, v, allowed, scale=self.scale, causal=False)
        if weights is not None:
            mixed = self.offered(q, k, v, mixed, weights, allowed(slice(None)))
        return Result(unmarked(self.o_proj(mixed.transpose(1, 2).flatten(-2)), KINDS), weights)
