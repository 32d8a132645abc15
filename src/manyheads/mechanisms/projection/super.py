"""Super attention: a learned map along the sequence instead of a value projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.passes import attend_where, joined
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.softmax import Where


@register
class Super(Mechanism):
    """Values are tokens mixed along the sequence by a learned matrix before attention weighs them; keys are tokens.

        head i = softmax((x W_q^i) x_i^T / sqrt(d)) W_A x_i,  x_i = x[:, i d : (i + 1) d],  output = concat(heads) W_o

    W_A [max_length, max_length] is shared by the heads and starts as the identity (the paper does not say); its rows
    and columns are positions. Causal: its lower triangle only. heads=1 is the paper's form. Padded tokens enter no mix.
    Matrix: softmax(..) W_A, over tokens; entries may be negative.
    Source: Hosseini and Hosseini, You Need to Pay Better Attention, arXiv:2403.01643. The public ports differ from the
    paper: one adds biases and normalises over queries, one takes W_A transposed. This file follows the equation.
    """

    card = Card(
        name="super",
        title="You Need to Pay Better Attention (Super Attention)",
        reference="arXiv:2403.01643",
        family=Family.PROJECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n^2",
        state="n",
        example={"max_length": 81},
        notes="no longer than max_length tokens; a dense mask forbids keys, not what was mixed into their values",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, max_length: int = 1024, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.scale = self._split_heads() ** -0.5
        if max_length < 1:
            raise ValueError(f"super: max_length={max_length} must be positive")
        self.max_length = max_length
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.mixing = nn.Parameter(torch.eye(max_length))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "super: a dense mask was given, but values are mixtures of tokens, among them forbidden ones; give key "
                "padding [batch, n] as the mask"
            )
        m = call.seen + x.shape[1]
        if m > self.max_length:
            raise ValueError(
                f"super: {m} tokens (x has shape {tuple(x.shape)}), but it was built with "
                f"max_length={self.max_length}; build it with a larger one, or shorten the input"
            )
        if call.positions is not None:
            low, high = (int(end) for end in call.positions.aminmax())
            if low < 0 or high >= self.max_length:
                raise ValueError(
                    f"super: positions from {low} to {high} were given, but max_length={self.max_length}; want 0 to "
                    f"{self.max_length - 1}"
                )
        tokens = self._split(x)
        if call.padding is not None:
            tokens = tokens.masked_fill(~call.padding[:, None, :, None], 0.0)
        where, (keys,) = joined(call, x, self.causal, tokens=tokens)
        placed = call.positions is None and (call.state is None or "positions" not in call.state.grown)
        values = self._mixing(where, placed, rows=x.shape[1]) @ keys
        if call.state is not None:
            values = call.state.append("values", values, blends=True)
        mixed, weights = attend_where(
            self._split(self.q_proj(x)), keys, values, where, scale=self.scale, need_weights=call.need_weights
        )
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if weights is None:
            return Result(output)
        over_tokens = weights @ self._mixing(where, placed, rows=m)
        if where.padding is not None:
            over_tokens = over_tokens.masked_fill(~where.padding[:, None, None], 0.0)
        return Result(output, over_tokens)

    def _mixing(self, where: Where, placed: bool, rows: int) -> Tensor:
        """W_A for the last `rows` tokens and all tokens, [b or 1, 1, rows, m]. placed: positions are places."""
        m = len(where.j)
        if placed:
            part = self.mixing[m - rows : m, :m][None]
        else:
            # A gather, as positions differ from row to row of a left-padded batch.
            part = self.mixing[where.key_positions[:, m - rows :, None], where.key_positions[:, None]]
        if self.causal:
            part = part.masked_fill(where.j > where.j[m - rows :, None], 0.0)
        return part[:, None]

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
