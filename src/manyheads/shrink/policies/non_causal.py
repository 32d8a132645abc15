"""Non-causal attention: what a token would be asked for if those after it, and before it, could."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.outliers import note_both_ways, pooled
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import TextOrder, one_text, whole_number


@dataclass(kw_only=True)
class NonCausal(Policy):
    """Claim: attention in both directions, within chunks, tells a prompt's tokens apart without favouring early ones.

    score(t) = average over t and both neighbours of ||v_t|| A(t), [b, g, m]; A(t) = sum over the queries of t's chunk
    of softmax over the chunk of q k (not scaled), mean over a KV head's query heads. Each pass is cut into chunks of
    chunk_size from its first token on; a single token is a chunk.
    Source: the attention part of Compactor, arXiv 2507.08143, vnchari/compactor-vllm, NVIDIA/kvpress
    `non_causal_attention_press.py`. A last chunk that is shorter counts for what it holds, as in the official kernel;
    kvpress fills it with keys of score -1e-9, which take weight.
    """

    chunk_size: int = 256
    when: str = "prefill"
    notes: ClassVar[tuple[str, ...]] = ("asked",)

    def __post_init__(self) -> None:
        whole_number("NonCausal", "chunk_size", self.chunk_size, 1)
        super().__post_init__()

    def observe(self, view: View) -> None:
        note_both_ways(view, "asked", self.chunk_size, 0, 0)

    def score(self, view: View) -> Tensor:
        one_text(view, "NonCausal")
        return pooled(view, TextOrder.of(view), view.note("asked"), view.alive)
