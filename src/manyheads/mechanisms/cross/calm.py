"""CALM: composition of two language models."""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class Calm(SoftmaxAttention):
    """Cross attention from a layer of an anchor model to a layer of an augmenting model, both of them frozen.

        p = W_p h_A;  head_i = softmax(W_q^i h_B (W_k^i p)^T / sqrt(d)) W_v^i p;  result W_o concat(heads)

    The result is added to h_B, the anchor's states, before its next layer. x: h_B [b, n, dim]. context: h_A, of
    `source_dim` features (None: dim).
    Where both models read the same text while it is written, h_A must not show more than h_B has seen: give the
    triangular dense mask [1, 1, n, m] then.

    Source: Bansal et al., LLM Augmented LLMs: Expanding Capabilities through Composition, arXiv:2401.02412. The code
    released for Gemma (google-deepmind/calm) norms the result (RMS) before it is added, has biases and reads its
    padding mask without using it; this is the paper's form, the norm is left to the caller.
    """

    card = Card(
        name="calm",
        title="LLM Augmented LLMs: Expanding Capabilities through Composition",
        reference="arXiv:2401.02412",
        family=Family.CROSS,
        patterns={"noncausal-cross", "causal-cross"},
        time="n m",
        state="1",
        example={"source_dim": 12},
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, source_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        self.source_dim = dim if source_dim is None else source_dim
        if self.source_dim < 1:
            raise ValueError(f"calm: source_dim={source_dim} must be at least 1")
        self.proj = nn.Linear(self.source_dim, dim, bias=bias)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x, self.proj(source))
