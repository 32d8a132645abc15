"""InstABoost: more attention to a span, such as the instruction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from manyheads.hosts.taps import AttentionCall
from manyheads.steer.common import Heads, changed, normalised, parse_heads, positions
from manyheads.steer.method import Prompt, steering


@contextmanager
def boost(
    model: nn.Module,
    span: Sequence[int] | slice,
    factor: float,
    *,
    heads: Heads | None = None,
    stack: str | None = None,
) -> Iterator[None]:
    """Claim: instructions are followed more closely when every head attends to them more.

    A'_ij = A_ij M / Z_i for keys j of the span, A_ij / Z_i elsewhere, Z_i the new row sum; M = factor, over all layers
    and heads unless some are given. The same as adding log M to those keys' scores. factor 1 changes nothing, 0 hides
    the span. span: places in what was fed, padding included. stack: whose layers; the one that reads
    text. Source: arXiv 2506.13734, BrachioLab/InstABoost (factor
    3, the first tokens of the prompt).
    """
    if not factor >= 0:
        raise ValueError(f"boost: factor must be at least 0; got {factor}")

    # One row per step, alike in all layers that have the same heads chosen.
    rows: dict[tuple[int, ...] | None, Tensor] = {}

    def added(call: AttentionCall, own: list[int] | None) -> Tensor:
        """log factor on the span's columns, [1, 1 or h, 1, m]: what a softmax makes of it is the product."""
        key, chosen = call.key, None if own is None else tuple(call.check_heads(own))
        row = rows.get(chosen)
        if row is None or row.shape[-1] != key.shape[2] or row.dtype != key.dtype or row.device != key.device:
            columns = torch.zeros(key.shape[2], dtype=torch.bool)
            columns[positions(span, key.shape[2])] = True
            heads = torch.zeros(1 if own is None else call.heads, dtype=torch.bool)
            heads[slice(None) if own is None else own] = True
            here = (heads[:, None, None] & columns)[None].to(key.device)
            row = rows[chosen] = key.new_zeros(here.shape).masked_fill(here, math.log(factor))
        return row

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        n, m = call.query.shape[2], call.key.shape[2]
        places = positions(span, m)
        if factor == 1 or not places:
            return None
        if n == 1 and factor > 0:  # decoding: weights need not be made
            output = call.biased(added(call, own))
            if output is not None:
                return output

        def edit(weights: Tensor, rows: slice) -> Tensor:
            edited = weights.clone()
            edited[..., places] *= factor
            return normalised(edited, weights, call)

        return call.mix(edit, own)

    with changed(model, heads, change, stack, of_text=True):
        yield


@steering(
    "boost",
    title="more attention to a span of the prompt",
    source="arXiv 2506.13734",
    kinds=("language", "vision-language"),
    neutral={"factor": 1.0},
    strength="factor",
    reach=(0.0, 20.0),
)
def _open(
    model: nn.Module, prompt: Prompt, *, span: str = "text", factor: float = 3.0, heads: str | None = None
) -> AbstractContextManager[None]:
    return boost(model, prompt.places(span), factor, heads=parse_heads(heads))
