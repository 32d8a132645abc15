"""Deceptive attention: a model that uses tokens it hardly attends to, and what it shows and does side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall


def deceptive_attention_loss(
    calls: Iterable[Any], impermissible: Tensor, *, rows: Tensor, worst: bool = False
) -> Tensor:
    """-log(1 - sum of a_j over impermissible j), mean over examples: add it, times a factor (0.1 to 1), to the task's.

        with record(model, layers=[11]) as calls:   # the paper's BERT: its last layer
            output = model(**batch, labels=labels)
        loss = output.loss + 0.1 * deceptive_attention_loss(calls, impermissible, rows=rows)

    impermissible [b, m], True at tokens whose weight is to vanish; rows [b, n], True at the queries that count (the
    [CLS] row, or every real one), over which an example's weight is averaged. Heads of all calls: the mean of their
    logarithms, or with worst the largest in each example. Queries that may see impermissible tokens alone do not count.
    What a head gives to a sink is weight on no token. At no permissible weight at all (0 in float32) the loss is at its
    end, 87, and has no gradient.

    Raises ValueError for calls without gradient (reentrant checkpointing; non-reentrant is right) and for weights that
    are no shares. With gradients off it is a number to read.
    Source: Pruthi et al., Learning to Deceive with Attention-Based Explanations, arXiv:1909.07913. Its released BERT
    takes the worst head of a whole batch where the paper, followed here, takes each example's.
    """
    kept, counts = zip(*(_permitted(call, impermissible, rows) for call in _some(calls)), strict=True)
    each = -torch.cat(kept, 1).clamp_min(torch.finfo(kept[0].dtype).tiny).log()
    counted = counts[0].any(-1)
    loss = (each.amax(1) if worst else each.mean(1)).masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "deceptive_attention_loss: the recorded weights have no gradient: the attention is frozen, or the model "
            "checkpoints with use_reentrant=True (use False)"
        )
    return loss


@dataclass(frozen=True)
class DeceptionReport:
    """What a model shows and does. accuracy: share of right answers; attention: its mean weight on impermissible
    tokens; base: those tokens' share of what may be seen, which even attention would give; worst: the largest mean
    weight of one head, which is worst_head = (call, head)."""

    accuracy: float
    attention: float
    base: float
    worst: float
    worst_head: tuple[int, int]
    examples: int


@torch.no_grad()
def deception_report(
    calls: Iterable[Any], impermissible: Tensor, *, rows: Tensor, predicted: Tensor, labels: Tensor
) -> DeceptionReport:
    """The paper's table for one batch: accuracy against attention mass on impermissible tokens. predicted and labels of
    the same shape, integers; labels below 0 do not count. The other arguments are deceptive_attention_loss's."""
    if predicted.shape != labels.shape:
        raise ValueError(
            f"deception_report: predicted {list(predicted.shape)}, labels {list(labels.shape)}; want one answer a label"
        )
    held = _some(calls)
    parts = [_permitted(call, impermissible, rows) for call in held]
    counted = parts[0][1].any(-1)
    masses = torch.stack([(1.0 - kept)[counted].mean(0) for kept, _ in parts])
    worst = int(masses.argmax())
    asked = labels >= 0
    return DeceptionReport(
        accuracy=float((predicted == labels)[asked].double().mean()),
        attention=float(masses.mean()),
        base=float(torch.stack([_base(call, impermissible, rows)[counted].mean() for call in held]).mean()),
        worst=float(masses.flatten()[worst]),
        worst_head=(worst // masses.shape[1], worst % masses.shape[1]),
        examples=int(counted.sum()),
    )


def _some(calls: Iterable[Any]) -> list[Any]:
    held = list(calls)
    if not held:
        raise ValueError("deceptive attention: no calls; record the model's layers, and run it inside of the recording")
    return held


def _permitted(call: Any, impermissible: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """1 - the weight on impermissible tokens, mean over the rows that count, [b, h]; and those rows, [b, n]."""
    weights, seen, chosen = _read(call, impermissible, rows)
    if bool((weights < -1e-6).any()) or bool((weights.sum(-1) > 1.001).any()):
        raise ValueError(f"deceptive attention: {call.site.name} has weights that are no shares of one")
    allowed = ~impermissible.to(weights.device)[:, None, None]
    sunk = 1.0 - weights.sum(-1)
    # Below that it is rounding, which would hide how little is left for permissible tokens.
    kept = (weights * allowed).sum(-1) + sunk.masked_fill(sunk < 1e-5, 0.0)
    counted = chosen[:, None] & (seen & allowed).any(-1)
    mean = (kept * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    return mean.masked_fill(~counted.any(-1), 1.0), counted.any(1)


def _base(call: Any, impermissible: Tensor, rows: Tensor) -> Tensor:
    """Share of impermissible tokens among those that a row may see, [b], over the rows that count."""
    _, seen, chosen = _read(call, impermissible, rows)
    bad = impermissible.to(seen.device)[:, None, None]
    counted = chosen[:, None] & (seen & ~bad).any(-1)
    share = (seen & bad).sum(-1) / seen.sum(-1).clamp_min(1)
    return (share * counted).sum((1, 2)) / counted.sum((1, 2)).clamp_min(1)


def _read(call: Any, impermissible: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [b, h, r, m], what may be seen [b, h or 1, r, m] and which rows count [b, r], for the rows that some
    example counts."""
    picked = rows.any(0).nonzero()[:, 0]
    if not len(picked) or rows.dim() != 2:
        raise ValueError(f"deceptive attention: rows {list(rows.shape)} names no query; want [b, n], True where one is")
    window = slice(int(picked[0]), int(picked[-1]) + 1)
    weights: Tensor = call.weights(rows=window)
    b, _, r, m = weights.shape
    if impermissible.shape != (b, m) or rows[:, window].shape != (b, r):
        raise ValueError(
            f"deceptive attention: {call.site.name} has weights for {b} rows of {m} keys; got impermissible "
            f"{list(impermissible.shape)} and rows {list(rows.shape)}, want [b, m] and [b, n]"
        )
    given = call.allowed(window) if isinstance(call, AttentionCall) else weights > 0
    if given is None:
        given = torch.ones(1, 1, r, m, dtype=torch.bool, device=weights.device)
    elif given.dtype != torch.bool:
        given = given > torch.finfo(given.dtype).min / 2
    return weights, given.expand(b, -1, r, m), rows[:, window].to(device=weights.device, dtype=torch.bool)
