"""SnapKV: what the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class SnapKV(Policy):
    """Claim: the prompt's last queries show which of its tokens the answer will need.

    score(t) = avgpool_kernel(mean over the last window_size queries of softmax(q k_t)), mean over a KV head's query
    heads, [b, g, m]; the window itself stays. Source: arXiv 2404.14469, FasterDecoding/SnapKV `snapkv_utils.py` (which
    sums where this averages, and pools before the mean over heads: the same order). The pooled neighbours are those
    still held. At prefill, as in the paper, unless `when` says otherwise: while decoding the latest window_size queries
    are kept for it, as the class DecodingPress of NVIDIA/kvpress keeps hidden states; give an `interval`.
    """

    window_size: int = 32
    kernel_size: int = 5
    when: str = "prefill"

    def __post_init__(self) -> None:
        if not isinstance(self.window_size, int) or self.window_size < 1:
            raise ValueError(f"SnapKV: window_size must be a whole number of at least 1; got {self.window_size!r}")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"SnapKV: kernel_size must be odd; got {self.kernel_size!r}")
        super().__post_init__()

    @property
    def looks_back(self) -> int:
        return self.window_size

    @property
    def smallest(self) -> int:
        return self.window_size + 1

    def score(self, view: View) -> Tensor:
        votes = torch.zeros_like(view.keys[..., 0], dtype=torch.float32)
        voters = torch.zeros((), device=votes.device)
        for block, real in view.weights(last=self.window_size):
            votes += (block * real).sum(3).mean(2)
            voters = voters + real.sum((2, 3, 4))[..., None]
        votes = votes / voters.clamp_min(1)
        # The window's own tokens are not pooled into their neighbours: they stay anyway.
        inside = view.positions >= view.count[:, None, None] - self.window_size
        score = _pool(votes.masked_fill(inside | ~view.alive, 0), view.slots, self.kernel_size)
        return score.masked_fill(inside, torch.inf)


def _pool(votes: Tensor, slots: Tensor, kernel: int) -> Tensor:
    """Average over neighbours in the order of the text; the border counts as zeros."""
    order = slots.argsort(-1)
    pooled = avg_pool1d(votes.gather(-1, order).flatten(0, 1), kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(votes).scatter_(-1, order, pooled.view(votes.shape))
