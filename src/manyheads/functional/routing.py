"""Routing of tokens to a few of several experts or heads: who is chosen, the losses, and the products of the chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def top_k_mask(probs: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last axis and 0 elsewhere, in probs' dtype; no gradient."""
    return torch.zeros_like(probs).scatter_(-1, probs.detach().topk(k, -1).indices, 1.0)


def real_rows(values: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [b, n, c] -> [b n, c] with zeros at padding, and how many rows are real, at least one."""
    rows = values.flatten(0, -2)
    if real is None:
        return rows, rows.new_tensor(rows.shape[0])
    return rows.masked_fill(~real.flatten()[:, None], 0.0), real.sum().clamp(min=1).to(rows.dtype)


def balance_loss(probs: Tensor, mask: Tensor, real: Tensor | None) -> Tensor:
    """c^2 mean_i (P_i F_i) for probs and top-k membership [b, n, c]; P, F: means over the real tokens. k at balance."""
    (all_probs, count), (all_mask, _) = real_rows(probs, real), real_rows(mask, real)
    share, load = all_probs.sum(0) / count, all_mask.sum(0) / count
    return (share * load).mean() * probs.shape[-1] ** 2


def expert_losses(logits: Tensor, gates: Tensor, real: Tensor | None) -> Mapping[str, Tensor]:
    """cv, switch and z of a router with logits [b, n, c] and gates [b, n, c], zero where an expert was not chosen.

    cv: variance over mean squared of the experts' shares of all gates. switch: c sum_i P_i F_i with P the experts'
    shares of all probability and F their shares of all choices. z: mean over tokens of logsumexp(logits)^2.
    """
    experts = logits.shape[-1]
    probs, count = real_rows(logits.softmax(-1), real)
    chosen, _ = real_rows(gates, real)
    given = _shares(chosen.sum(0))
    spread = given.var() / (given.mean() ** 2 + 1e-10) if experts > 1 else given.sum() * 0
    switch = experts * (_shares(probs.sum(0)) * _shares((chosen > 0).to(probs.dtype).sum(0))).sum()
    size, _ = real_rows(logits.logsumexp(-1, keepdim=True), real)
    return {"cv": spread, "switch": switch, "z": size.square().sum() / count}


def _shares(total: Tensor) -> Tensor:
    return total / total.sum().clamp(min=1e-12)


def grouped_linear(rows: Tensor, experts: Tensor, weight: Tensor) -> Tensor:
    """rows [r, in], each times the matrix of its own expert, experts [r], weight [c, in, out] -> [r, out].

    Rows are put in the order of their experts, so that each matrix is read once, and only those chosen at all.
    """
    order = experts.argsort(stable=True)
    sizes = torch.bincount(experts, minlength=weight.shape[0]).tolist()
    parts = [part @ weight[expert] for expert, part in enumerate(rows[order].split(sizes)) if len(part)]
    return torch.cat(parts)[order.argsort()]
