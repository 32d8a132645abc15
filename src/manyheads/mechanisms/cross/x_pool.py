"""X-Pool: pooling of video frames that depends on the text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class XPool(SoftmaxAttention):
    """Each text pools the frames of a video with weights of its own: one vector of the video per text.

        a = LN_2(W_o softmax(W_q LN_1(t) (W_k LN_1(f))^T / sqrt(d)) W_v LN_1(f)),   result LN_3(a + W a)

    x: texts [b, n, dim], each one vector. context: frames [b, m, dim] of the video of that row. A retrieval score is
    the cosine of the result and its text; all texts against all videos: every text in every row. The text itself is
    not added, so that the result is made of frames only. Projections are the identity at first, biases zero.

    Source: Gorti et al., X-Pool: Cross-Modal Language-Video Attention for Text-Video Retrieval, arXiv:2203.15086, and
    its released transformer.py (whose default is one head), without its dropout.
    """

    card = Card(
        name="x-pool",
        title="X-Pool: Cross-Modal Language-Video Attention for Text-Video Retrieval",
        reference="arXiv:2203.15086",
        family=Family.CROSS,
        patterns={"noncausal-cross"},
        time="n m",
        state="",
        decodes=False,
        notes="texts are single vectors that do not see each other; give them in any order",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal, bias=True)
        self.linear = nn.Linear(dim, dim)
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(dim) for _ in range(3))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.linear):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(self.norm_1(x), self.norm_1(source))

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        pooled = self.norm_2(self.o_proj(mixed.transpose(1, 2).flatten(-2)))
        return self.norm_3(pooled + self.linear(pooled)), {}
