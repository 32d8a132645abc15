"""InstABoost: more attention to a span, such as the instruction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.taps import AttentionCall
from manyheads.steer.common import Heads, Span, changed, inside_call, normalised, parse_heads
from manyheads.steer.method import Prompt, steering


@contextmanager
def boost(
    model: nn.Module,
    span: Span,
    factor: float,
    *,
    heads: Heads | None = None,
    stack: str | None = None,
) -> Iterator[None]:
    """Claim: instructions are followed more closely when every head attends to them more.

    A'_ij = A_ij M / Z_i for keys j of the span, A_ij / Z_i elsewhere, Z_i the new row sum; M = factor, over all layers
    and heads unless some are given. The same as adding log M to those keys' scores. factor 1 changes nothing, 0 hides
    the span. span: places in what was fed, padding included, or [b, n] bool, each row's own. stack: whose layers; the
    one that reads text. Source: arXiv 2506.13734, BrachioLab/InstABoost (factor
    3, the first tokens of the prompt).
    """
    if not 0 <= factor < math.inf:
        raise ValueError(f"boost: factor must be finite, at least 0; got {factor}")

    # One row per step, alike in all layers that have the same heads chosen; and the span's places.
    rows: dict[tuple[int, ...] | None, Tensor] = {}
    found: dict[tuple[Any, ...], tuple[Tensor, bool]] = {}

    def spanned(call: AttentionCall) -> tuple[Tensor, bool]:
        """[1 or b, m] bool, and whether there is any."""
        size = call.query.shape[0], call.key.shape[2], call.key.device
        if size not in found:
            found.clear()
            places = inside_call(span, call, "boost")
            found[size] = places, bool(places.any())
        return found[size]

    def added(call: AttentionCall, own: list[int] | None) -> Tensor:
        """log factor on the span's columns, [1 or b, 1 or h, 1, m]: what a softmax makes of it is the product."""
        key, chosen = call.key, None if own is None else tuple(call.check_heads(own))
        places, row = spanned(call)[0], rows.get(chosen)
        if row is None or row.shape[::3] != places.shape or row.dtype != key.dtype or row.device != key.device:
            heads = torch.zeros(1 if own is None else call.heads, dtype=torch.bool, device=key.device)
            heads[slice(None) if own is None else own] = True
            here = heads[:, None, None] & places[:, None, None]
            row = rows[chosen] = key.new_zeros(here.shape).masked_fill(here, math.log(factor))
        return row

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        places, some = spanned(call)
        if factor == 1 or not some:
            return None
        if call.query.shape[2] == 1 and factor > 0:  # decoding: weights need not be made
            output = call.biased(added(call, own))
            if output is not None:
                return output

        def edit(weights: Tensor, rows: slice) -> Tensor:
            return normalised(torch.where(places[:, None, None], weights * factor, weights), weights, call)

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
