"""MoA's influence: how much the loss grows, to first order, when a head sees no more than its span.

Claim: heads differ in how far back they must see and in how that grows with the length; masking attention entry (i, j)
and renormalising the row changes the loss by about
    E_ij = -A_ij G_ij + A_ij / (1 - A_ij) sum_{n != j} G_in A_in = A_ij (S_i - G_ij) / (1 - A_ij)
with S_i = sum_n G_in A_in, A the weights and G the loss's gradient by them. A span (alpha, beta) at length N masks the
entries beyond the last alpha + beta N tokens, first tokens excepted; its influence is the sum of E over them.
G is never kept: G_ij = (d loss / d output_i) . v_j, a block of rows at a time, after one backward pass.
Source: arXiv 2406.14909, thu-nics/MoA. There spans are in blocks of 64 and the answers are the dense model's own to
long questions; here spans are in tokens and the answers are hidden keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from manyheads.heads.scores import by_layer
from manyheads.hosts.calls import opened
from manyheads.hosts.device import device_of, frozen
from manyheads.hosts.probes import Inputs
from manyheads.runs.steps import Tell, silent

# Sequences of each length.
COUNT = 4


@dataclass(frozen=True)
class Span:
    """A head sees the last alpha + beta N tokens of N, its own included, and the first ones."""

    alpha: int = 0
    beta: float = 0.0

    def at(self, length: int) -> int:
        return max(1, int(self.alpha + self.beta * length))


def default_spans(length: int) -> list[Span]:
    """Three that stay as they are with the length and three that grow with it, as large at this length."""
    parts = (16, 8, 4)
    return [Span(alpha=length // part) for part in parts] + [Span(beta=1 / part) for part in parts]


def influence(
    inputs: Inputs,
    *,
    spans: Sequence[Span],
    lengths: Sequence[int],
    sink_size: int,
    count: int = COUNT,
    tell: Tell = silent,
) -> Tensor:
    """[spans, lengths, layers, query heads]: mean growth of the loss on hidden keys, over `count` sequences each."""
    of_lengths = []
    for k, length in enumerate(lengths):
        windows = [span.at(length) for span in spans]
        total = torch.zeros(())
        for number in range(count):
            tell(k * count + number, len(lengths) * count, f"{length} tokens")
            needles = inputs.needles(length, number, keys=inputs.room(length))
            total = total + of_sequence(inputs.loaded.model, needles.ids, needles.labels, windows, sink_size)
        of_lengths.append(total / count)
    return torch.stack(of_lengths, 1)


def of_sequence(model: Any, ids: Tensor, labels: Tensor, windows: Sequence[int], sink_size: int) -> Tensor:
    """[windows, layers, heads] for ids [n]; the loss is the mean over the tokens after the labelled ones, bool [n]."""
    from manyheads.hosts.taps import record

    ids, labels = ids.to(device_of(model)), labels.to(device_of(model))
    with frozen(model), record(model, gradients=True, kind="self") as calls:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        cross_entropy(logits[labels].float(), ids[1:][labels[:-1]]).backward()
        del logits
        with torch.no_grad():
            return by_layer([_of_call(call, windows, sink_size).mT for call in calls]).permute(2, 0, 1)


def _of_call(call: Any, windows: Sequence[int], sink_size: int) -> Tensor:
    """[windows, heads], a block of rows at a time."""
    call = opened(call, "influence")
    total = torch.zeros(len(windows), call.heads, dtype=torch.float64)
    for rows in call.blocks():
        effect = effects(call.weights(rows=rows), call.weight_gradients(rows=rows))
        for k, window in enumerate(windows):
            hidden = beyond(rows, effect.shape[-1], window, sink_size, effect.device)
            total[k] += torch.einsum("bhnm,nm->h", effect, hidden.to(effect.dtype)).double().cpu()
    return total.float()


def effects(weights: Tensor, gradients: Tensor) -> Tensor:
    """E_ij for weights and gradients [..., rows, m]. A row's only entry cannot be masked: nothing would be left."""
    through = (weights * gradients).sum(-1, keepdim=True)
    rest = 1 - weights
    effect = weights * (through - gradients) / rest.clamp_min(torch.finfo(weights.dtype).eps)
    return effect.masked_fill(rest <= torch.finfo(weights.dtype).eps, 0)


def beyond(rows: slice, keys: int, window: int, sink_size: int, device: torch.device) -> Tensor:
    """[rows, keys] True where the span hides a key: neither among the last `window` nor among the first ones."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return (j <= i - window) & (j >= sink_size)
