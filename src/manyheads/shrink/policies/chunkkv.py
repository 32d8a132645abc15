"""ChunkKV: whole stretches of text stay or go."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.shrink.compress import View
from manyheads.shrink.policies.based import Based
from manyheads.shrink.policies.snapkv import SnapKV
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import TextOrder, one_text, whole_number


def _observed() -> Policy:
    return SnapKV(kernel_size=1)


@dataclass(kw_only=True)
class ChunkKV(Based):
    """Claim: neighbouring tokens mean something together; keep or drop them together, the same in all heads.

    score(chunk) = mean over its chunk_length tokens of the base's scores summed over a layer's KV heads; the best
    chunks stay, as many as fit whole into the budget. Source: arXiv 2502.00299, NVIDIA/kvpress `chunkkv_press.py`,
    which counts the budget in chunks (a last, shorter one as much as any) and so may keep a few tokens more or fewer.
    The base is the paper's observation window without pooling unless another is given; chunks that hold a token which
    the base protects stay, as the paper's window does (kvpress: it counts as the highest score). The paper's reuse of
    one layer's choice in the next is left out: it saves time, not memory.
    """

    base: Policy = field(default_factory=_observed)
    chunk_length: int = 20

    def __post_init__(self) -> None:
        whole_number("ChunkKV", "chunk_length", self.chunk_length, 1)
        if self.allocation is not None:
            raise ValueError("ChunkKV: all heads of a layer keep the same chunks; leave allocation out")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        protected = self.base.smallest - 1
        # Protected tokens stand at both ends of the text, and may touch a chunk more at each.
        return self.chunk_length if not protected else protected + 2 * self.chunk_length

    def score(self, view: View) -> Tensor:
        """The place of each token's chunk among all, from the worst on."""
        one_text(view, "ChunkKV")
        text = TextOrder.of(view)
        live = view.alive
        chunks = self._cut(text, self._scorer.score(view).double().masked_fill(~live, 0)).sum(-1).sum(1, keepdim=True)
        sizes = self._cut(text, live.double()).sum(-1)
        means = torch.where(sizes > 0, chunks / sizes.clamp_min(1), -torch.inf)
        places = means.argsort(-1).argsort(-1).double()
        return text.unsort(places.repeat_interleave(self.chunk_length, -1)[..., : live.shape[-1]])

    def merge(self, view: View, keep: Tensor) -> Tensor:
        """Without the tokens of a chunk that did not fit whole."""
        text = TextOrder.of(view)
        left_out = self._cut(text, (view.alive & ~keep).double()).sum(-1) > 0
        return keep & ~text.unsort(left_out.repeat_interleave(self.chunk_length, -1)[..., : keep.shape[-1]])

    def _cut(self, text: TextOrder, rows: Tensor) -> Tensor:
        """Rows [b, g, m] in the order of the text, [b, g, chunks, chunk_length]."""
        rows = text.sort(rows)
        return pad(rows, (0, -rows.shape[-1] % self.chunk_length)).unflatten(-1, (-1, self.chunk_length))
