"""TOVA: the entry that the latest token attends to least goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class TOVA(Policy):
    """Claim: a transformer is a multi-state RNN whose state may be chosen by the latest token's attention alone.

    score(t) = mean over a KV head's query heads of softmax(q_last k_t), [b, g, m]. Source: arXiv 2401.06104. The paper
    averages over all heads of a layer, so that they drop the same token; here every KV head drops its own, and
    shared=True is the paper's rule.
    """

    shared: bool = False

    def score(self, view: View) -> Tensor:
        alike = view.passes[-1].seen.padding is None
        # With padding a row's last token may be any of the pass.
        parts = [block[:, :, :, 0] if alike else (block * real).sum(3) for block, real in view.weights(last=1)]
        score = (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)).mean(2)
        return score.mean(1, keepdim=True).expand(score.shape) if self.shared else score
