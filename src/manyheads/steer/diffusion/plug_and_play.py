"""Plug-and-play features: a picture is redrawn to another caption with the layout of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall
from manyheads.steer.diffusion.common import (
    Active,
    attended,
    changed,
    check_rows,
    conditional,
    halves,
    replaced_rows,
    taken,
)
from manyheads.steer.diffusion.drawing import Drawing, Rows, drawn_with, first_steps, referred
from manyheads.steer.method import steering


@contextmanager
def plug_and_play(
    model: Any,
    source: int,
    *,
    active: Active | None = None,
    features: nn.Module | None = None,
    features_active: Active | None = None,
) -> Iterator[None]:
    """Claim: a target that attends by the source's queries and keys keeps the source's layout under its own caption.

    At self attention, in every row of the batch but the source's: softmax(q_s k_s^T scale) v, with q_s, k_s of the
    source's captioned row and v of the row's own, in both halves of a guided batch; cross attention is left alone.
    source: its place among the captions. features: a module of the residual branch (such as
    `model.layers[1].down`), whose output, before it is added to the stream, is likewise the source's. The source's
    pictures come from `invert` and `held=`, which wants it as the last caption. active(step, layer): where;
    `until(0.5, steps)` as published for attention and `until(0.8, steps)` for features. With no step active nothing
    changes; where all are, and captions and noise are the source's, the target is the source.
    Source: arXiv 2211.12572, MichalGeyer/pnp-diffusers. Different: there the source is one row of three, unguided; the
    released code also acts at time 1000 exactly, whatever the schedule; its convolutions' features are here whatever
    residual branch is named.
    """

    def change(call: AttentionCall, step: Any) -> Tensor:
        own = _source_row(call, step, source)
        count = call.query.shape[0]
        if count == 1:
            raise ValueError("plug_and_play: the batch holds the source alone; want a target beside it")
        # In line with the others the source, whose queries and keys these are, costs no pass of the layer's own.
        alike = call.mask is None and not call.causal
        rows = [row for row in range(count) if alike or row != own]
        query, key = (tensor[own : own + 1].expand(len(rows), -1, -1, -1) for tensor in (call.query, call.key))
        return replaced_rows(call, rows, attended(call, query, key, taken(call.value, rows)))

    with ExitStack() as stack:
        stack.enter_context(changed(model, "plug_and_play", change, kind="self", active=active))
        if features is not None:
            stack.enter_context(_injected(model, features, source, features_active))
        yield


def _source_row(call: AttentionCall, step: Any, source: int) -> int:
    rows = conditional(call, step)
    return rows[check_rows("plug_and_play: source", [source], len(rows))[0]]


@contextmanager
def _injected(model: Any, features: nn.Module, source: int, active: Active | None) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        step = getattr(model, "step", None)
        if step is None:
            raise ValueError("plug_and_play: features are of a step, and none is told: run the model by its sample()")
        if active is not None and not active(step.index, 0):
            return None
        rows = halves(len(output), step)[1]
        own = rows[check_rows("plug_and_play: source", [source], len(rows))[0]]
        return output[own : own + 1].expand_as(output)

    handle = features.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@steering(
    "plug_and_play",
    title="drawn with the layout of a source picture, which attends in its place",
    source="arXiv 2211.12572",
    kinds=("diffusion",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
    towers=("patches",),
)
def _open(model: Any, drawing: Drawing, *, source: str, share: float = 0.5) -> AbstractContextManager[Rows]:
    """source: the source's caption, drawn beside it or of the picture that is given."""
    rows = referred(model, drawing, "plug_and_play", source)
    return drawn_with(plug_and_play(model, 1, active=first_steps("plug_and_play", drawing, share)), rows)
