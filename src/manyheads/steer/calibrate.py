"""ACT: attention sinks other than the first are turned down, and what they held goes to the other tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from manyheads.hosts.taps import AttentionCall
from manyheads.steer.common import Heads, changed, check_share


def real_keys(call: AttentionCall) -> Tensor:
    """[b or 1, 1 or h, m] bool: keys that some query may see; padding is seen by none."""
    if call.mask is None:
        return torch.ones(1, 1, call.key.shape[2], dtype=torch.bool, device=call.key.device)
    seen = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
    return seen.any(-2)


def column_means(call: AttentionCall, heads: list[int] | None) -> Tensor:
    """[b, heads, m]: the attention that a key gets, on average over the real queries that come no earlier than it."""
    n, m = call.query.shape[2], call.key.shape[2]
    queries = real_keys(call)[:, :1, m - n :].float()
    parts = [
        (call.weights(heads, rows) * queries[:, :, rows, None]).sum(2, keepdim=True) for rows in call.blocks(heads)
    ]
    later = queries.flip(-1).cumsum(-1).flip(-1)
    viewers = torch.cat([later[..., :1].expand(-1, -1, m - n), later], -1)
    return torch.cat(parts, 2).sum(2) / viewers.clamp_min(1)


def sinks_of(call: AttentionCall, heads: list[int] | None, alpha: float) -> Tensor:
    """[b, heads, m] bool: keys whose mean attention exceeds alpha / (real keys), but for a head's first such key."""
    real = real_keys(call)[:, :1]
    above = (column_means(call, heads) > alpha / real.sum(-1, keepdim=True)) & real
    return above & (above.long().cumsum(-1) > 1)


@contextmanager
def calibrate(
    model: nn.Module, beta: float, *, alpha: float = 5.0, heads: Heads | None = None, stack: str | None = None
) -> Iterator[None]:
    """Claim: sinks in the middle of a text take attention that belongs to its words; turning them down mends answers.

    sinks S_h = {j : mean_i A_ij > alpha / m} without the first of them, padding not counted; A'_ij = beta A_ij for j in
    S_h, the freed (1 - beta) sum_S A_ij shared among the other keys in proportion to A_ij. Sinks are found on the
    prompt's full matrix (in blocks of rows) and remembered while decoding. beta 1 changes nothing. stack: whose layers;
    the one that reads text.
    Source: arXiv 2406.15765, GATECH-EIC/ACT `atten_process_eval`; there sinks come from one row of the batch alone and
    row 0 is left out; here each row has its own. Heads are chosen on a calibration set in the paper: pass them.
    """
    check_share("calibrate: beta", beta)
    known: dict[int, Tensor] = {}

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        if beta == 1:
            return None
        n, m = call.query.shape[2], call.key.shape[2]
        if n > 1 or m == 1 or call.layer not in known:
            known[call.layer] = sinks_of(call, own, alpha)
        sinks = nn.functional.pad(known[call.layer], (0, m - known[call.layer].shape[-1])).unsqueeze(2)

        def edit(weights: Tensor, rows: slice) -> Tensor:
            others = weights.masked_fill(sinks, 0)
            rest = others.sum(-1, keepdim=True)
            freed = (1 - beta) * (weights.sum(-1, keepdim=True) - rest)
            # A row that sees nothing but sinks keeps what it has.
            moved = torch.where(sinks, beta * weights, others * (1 + freed / rest.clamp_min(1e-12)))
            return torch.where(rest > 1e-6, moved, weights)

        return call.mix(edit, own)

    with changed(model, heads, change, stack, of_text=True):
        yield
