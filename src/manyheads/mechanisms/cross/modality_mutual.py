"""Modality-mutual attention, of AKI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_rows, grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.kinds import checked_kinds
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention

KINDS = 3
IMAGE, QUESTION = 1, 2


@register
class ModalityMutual(SoftmaxAttention):
    """Causal attention in which image tokens also see the question that comes after them.

        softmax over j <= i, or j a question token where i is an image token, of (q_i . k_j / sqrt(d)), times v_j

    No parameter is added. Image tokens stay causal among themselves, and the answer is causal. token_kinds [b, n]: 1
    for a token of the image, 2 for one of the question, 0 for any other; of padding it may be anything.

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
        takes={"token_kinds": "[b, n] integers, 1 for a token of the image, 2 of the question, 0 for any other"},
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
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"token_kinds": 2 - torch.arange(n)[None] % 5 % KINDS}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, where = self._read(x, context, call)
        kind = checked_kinds(self.card.name, call.inputs["token_kinds"], x, call.padding, KINDS)
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
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)
