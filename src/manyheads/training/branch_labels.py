"""ACMIL's semantic loss: every branch of the pool answers for itself, and the bag for all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manyheads.mechanism import Mechanism, Result
from manyheads.mechanisms.pooling.acmil import Acmil
from manyheads.training.given import check_mechanism_given


class BranchLabels(nn.Module):
    """An `acmil` pool with a classifier for each branch and one for the bag.

        z_k = W_k sum_i a_ki h_i + c_k,      z = W sum_i (mean_k a_ki) h_i + c
        losses["branches"] = mean over k of CE(z_k, y),   losses["bag"] = CE(z, y),   losses["diversity"] the pool's own

    forward(x [b, n, dim], labels [b]) -> Result with the bag's logits z [b, classes] as output; the losses of labels
    are there where labels are given, in either mode, and their sum with the diversity is what the paper trains on (all
    with weight 1). Branches read the weights of the same pass, with the instances that it masks. `branch_logits`: z_k
    alone. Bags that are all padding, or whose label is -100, count in no loss of labels. Each branch has a classifier
    of its own, as in the released code.

    Source: Zhang et al., Attention-Challenging Multiple Instance Learning, arXiv:2311.07125, and its released ACMIL_GA
    (classifier.k, Slide_classifier). ValueError for any other mechanism, whose branches are no pools of one bag each.
    """

    def __init__(self, pool: Mechanism, classes: int) -> None:
        super().__init__()
        check_mechanism_given("BranchLabels", pool)
        if not isinstance(pool, Acmil):
            raise ValueError(
                f"BranchLabels: {pool.card.name} has no branches that pool a bag each; want create_attention('acmil')"
            )
        if classes < 2:
            raise ValueError(f"BranchLabels: classes={classes}; want at least 2")
        self.pool = pool
        self.branches = nn.ModuleList(nn.Linear(pool.dim, classes) for _ in range(pool.heads))
        self.bag = nn.Linear(pool.dim, classes)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None, need_weights: bool = False
    ) -> Result:
        pooled: Result = self.pool(x, mask=mask, need_weights=True)
        assert pooled.weights is not None
        logits, losses = self.bag(pooled.output), dict(pooled.losses)
        if labels is not None:
            if labels.shape != x.shape[:1]:
                raise ValueError(f"BranchLabels: labels {tuple(labels.shape)} for {len(x)} bags; want one each")
            labels = labels.long()
            real = labels != -100 if mask is None else mask.any(1) & (labels != -100)
            each = self.branch_logits(x, pooled.weights, mask=mask)
            losses["branches"] = _mean(each, labels[:, None].expand(each.shape[:2]), real[:, None])
            losses["bag"] = _mean(logits, labels, real)
        return Result(logits, pooled.weights if need_weights else None, losses)

    def branch_logits(self, x: Tensor, weights: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """z_k, [b, k, classes], of a pass's weights [b, k, 1, n]."""
        if mask is not None:
            # A weight of zero does not keep a padded NaN out of a sum.
            x = x.masked_fill(~mask[..., None], 0.0)
        bags = weights[:, :, 0] @ self.pool.instances(x)
        return torch.stack([own(bags[:, k]) for k, own in enumerate(self.branches)], 1)


def _mean(logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
    """Cross entropy, mean over what is real; logits [..., classes], labels [...], real that broadcasts to it."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    real = real.expand(labels.shape)
    return each.masked_fill(~real, 0.0).sum() / real.sum().clamp_min(1)
