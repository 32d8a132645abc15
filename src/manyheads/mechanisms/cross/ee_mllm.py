"""Composite attention, of EE-MLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_rows, grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class CompositeAttention(SoftmaxAttention):
    """Text attends to images and to the text before it in one softmax; images attend to nothing.

        softmax over [all m image tokens; text tokens j <= i] of (q_i . k_j / sqrt(d)), times v_j

    with the same W_q, W_k, W_v for text and images, those of a language model: nothing is added to it, and the m^2
    scores among image tokens are saved. x: text [b, n, dim]. context: image tokens [b, m, dim], as they come into this
    layer. rotary: the real image tokens stand at 0, 1, .., text after the last of them.
    A mask speaks of the images: x must hold no padding. Weights [b, heads, n, m]: on the images; the rest is on text.

    Source: Ma et al., EE-MLLM, arXiv:2408.11795 (its description: no code is released). How image tokens are carried
    to the next layer, past the attention, is the surrounding block's. The paper's one sequence of images and text is
    given here in two parts, since image tokens get no output; causal-self is not declared.
    """

    card = Card(
        name="ee-mllm",
        title="EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model",
        reference="arXiv:2408.11795",
        family=Family.CROSS,
        patterns={"causal-cross"},
        time="n (n + m)",
        state="n",
        notes="attends to the context and to x itself; x must hold no padding",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        kv_heads: int | None = None,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)

    def attend(self, x: Tensor, context: Tensor, call: Call) -> Result:
        n, m, state = x.shape[1], context.shape[1], call.state
        images, count = self._images(x, context, call)
        positions = call.query_positions(x) + count
        q, k, v = self.project(x, x)
        q, k = self.position(q, k, positions, positions)
        if state is None:
            k, v = (torch.cat(pair, 2) for pair in zip(images, (k, v), strict=True))
        else:
            k, v = state.append("keys", k), state.append("values", v)
            state.advance(n)
        text = k.shape[2] - m
        i = torch.arange(text - n, text, device=x.device)
        j = torch.arange(-m, text, device=x.device)  # images stand before all text
        given = call.dense if call.padding is None else call.padding[:, None, None, :]

        def allowed(rows: slice) -> Tensor | None:
            seen = j <= i[rows, None]
            if given is None:
                return seen[None, None] if n > 1 else None
            images = given if call.dense is None else given[:, :, rows]
            return seen & F.pad(images, (0, text), value=True)

        weights = None
        if call.need_weights:
            weights = masked_softmax(grouped_scores(q * self.scale, k), allowed(slice(None)))
            mixed = grouped_mix(weights, v)
            weights = weights[..., :m]
        else:
            mixed = attend_rows(q, k, v, allowed, scale=self.scale, causal=True)
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)

    def _images(self, x: Tensor, context: Tensor, call: Call) -> tuple[tuple[Tensor, ...], Tensor]:
        """Keys and values of the images, where the state does not hold them, and how many real ones a row has, [b, 1].
        In a state they are the first rows of what grows, so that no step copies them."""
        state = call.state
        if state is not None and state.context:
            held = len(state.grown["keys"]) - state.length
            if held != context.shape[1]:
                raise ValueError(
                    f"ee-mllm: the state was made for a context of {held} tokens, this one has {context.shape[1]}; "
                    "start a new state for a new context"
                )
            return (), state.context["count"]
        q, k, v = self.project(x[:, :0], context)
        real = torch.ones_like(context[..., 0], dtype=torch.bool) if call.padding is None else call.padding
        # Padding takes up no place, so that text stands where it would without it.
        places = (real.cumsum(1) - 1).clamp(min=0)
        _, k = self.position(q, k, places[:, :0], places)
        count = real.sum(1, keepdim=True)
        if state is not None:
            state.context["count"] = count
            state.append("keys", k)
            state.append("values", v)
        return (k, v), count
