"""Multi-prompt Sinkhorn attention: weights are a transport plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import grouped_mix
from manyheads.functional.precision import unit
from manyheads.functional.sinkhorn import transport_plan
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where


@register
class Sinkhorn(SoftmaxAttention):
    """Queries share the keys out among themselves: every key gives as much as every other, so that prompts specialise.

        T = argmin <T, 1 - S> - epsilon H(T) over T >= 0 with T 1 = 1 and T' 1 = n / m,  S_ij = cos(q_i, k_j);  T v

    Found by Sinkhorn's iterations on logarithms, rows last. n queries (the prompts of a class) and m keys (pixels).
    Source: Kim et al., OTSeg, arXiv:2403.14183, and its code, which has one head whatever it is told, rows that sum to
    1 / n, and stops when the mean change over the batch is small, or after 100 iterations: here heads are heads, rows
    sum to one (Sinkformers, arXiv:2110.11773), and the number of iterations is fixed, for a row is not to depend on its
    neighbours. What its decoder makes of T beside T v, a map of scores n m T S, is left out.
    """

    shares_kv = False
    card = Card(
        name="sinkhorn",
        title="OTSeg: Multi-prompt Sinkhorn Attention for Zero-Shot Semantic Segmentation",
        reference="arXiv:2403.14183",
        family=Family.SCORING,
        patterns={"noncausal-self", "noncausal-cross"},
        time="n^2 iterations",
        state="",
        decodes=False,
        example={"iterations": 8, "epsilon": 0.2},
        notes="no causal form: what a query gets depends on what later ones take",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        epsilon: float = 0.05,
        iterations: int = 50,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias)
        if not epsilon > 0 or iterations < 1:
            raise ValueError(f"sinkhorn: epsilon={epsilon}, iterations={iterations}; want both above zero")
        self.epsilon, self.iterations = epsilon, iterations

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, where = self._read(x, context, call)
        q, k = unit(q), unit(k)
        weights = transport_plan(q @ k.mT / self.epsilon, self._pairs(where, context), self.iterations).to(v.dtype)
        mixed = self.offered(q, k, v, grouped_mix(weights, v), weights, where)
        output, losses = self.output(mixed, x, call)
        return Result(output, weights if call.need_weights else None, losses)

    def _pairs(self, where: Where, context: Any) -> Tensor | None:
        """A padded token neither gives nor takes."""
        allowed = where.allowed()
        if allowed is None or where.padding is None or context is not None:
            return allowed
        return allowed & where.padding[:, None, :, None]
