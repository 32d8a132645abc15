"""MoRE's contrast of three modalities: image and signal are each drawn to the text that describes both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from manyheads.functional.precision import own_dtype


def anchored_contrast(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.1,
    present: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Sum over the other modalities o of the contrast between o and the anchor t, both ways:

        L = sum_o ( NCE(t, o) + NCE(o, t) ) / 2
        NCE(p, q) = - mean_i log exp(cos(p_i, q_i) / tau) / sum_j exp(cos(p_i, q_j) / tau)

    anchor [b, d] (the reports); others: each [b, d] (X-rays, ECGs). The others never meet each other: they are aligned
    by what both have in common with the anchor. temperature: tau, a number or a tensor that is trained. present: for
    each of the others [b] bool or None, False where an example has no such modality: it is neither drawn nor a negative
    there. A modality that at most one example has adds 0. In half precision, and under autocast, the logits are made
    in float32.

    Source: Thapa et al., MoRE, arXiv:2410.16239, and its released pretrain_multimodel.py. There the temperature is
    0.02, declared as trained but given to no optimiser. Its linear attention drop is `drop_key`. ValueError: shapes
    that differ, a temperature that is not above 0, as many masks as modalities not given.
    """
    masks = [None] * len(others) if present is None else list(present)
    if not others or len(masks) != len(others):
        raise ValueError(f"anchored_contrast: {len(others)} other modalities and {len(masks)} masks; want one each")
    tau = float(torch.as_tensor(temperature).detach())
    if not tau > 0:
        raise ValueError(f"anchored_contrast: temperature={tau}; want it above 0")
    return torch.stack([_both_ways(anchor, *pair, temperature) for pair in zip(others, masks, strict=True)]).sum()


def _both_ways(anchor: Tensor, other: Tensor, real: Tensor | None, temperature: float | Tensor) -> Tensor:
    if anchor.dim() != 2 or other.shape != anchor.shape:
        raise ValueError(
            f"anchored_contrast: {tuple(anchor.shape)} and {tuple(other.shape)}; want [batch, dim] of every modality, "
            "projected to one width"
        )
    if real is not None:
        anchor, other = anchor[real], other[real]
    wide = torch.promote_types(anchor.dtype, torch.float32)
    if not len(anchor):
        return anchor.new_zeros((), dtype=wide)
    left, right = (normalize(each.to(wide), dim=-1) for each in (anchor, other))
    with own_dtype(left):
        logits = left @ right.T / temperature
    which = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, which) + cross_entropy(logits.T, which)) / 2
