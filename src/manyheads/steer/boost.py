"""InstABoost: more attention to a span, such as the instruction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

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

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        places = positions(span, call.key.shape[2])
        if factor == 1 or not places:
            return None
        if own is None and factor > 0:  # decoding: one query, whose weights need not be made
            bias = call.key.new_zeros(1, 1, 1, call.key.shape[2])
            bias[..., places] = math.log(factor)
            output = call.biased(bias)
            if output is not None:
                return output

        def edit(weights: Tensor, rows: slice) -> Tensor:
            weights = weights.clone()
            weights[..., places] *= factor
            return normalised(weights)

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
