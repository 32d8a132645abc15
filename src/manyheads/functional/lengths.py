"""Lengths that are symbols while a graph is traced: no loop can count by them, no branch may ask how long they are."""

from __future__ import annotations

import torch


def varies(length: int) -> bool:
    """Whether torch.export or torch.compile is tracing for any such length."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(length)


def within(length: int, limit: int) -> bool:
    """length <= limit; False where the length varies, so that one graph serves all of them."""
    return not varies(length) and length <= limit


def spans(length: int, step: int) -> list[slice]:
    """0 .. length in slices of `step`; in one where the length varies."""
    if varies(length):
        return [slice(0, length)]
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
