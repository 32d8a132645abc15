"""Layers below which tokens have left: the places of what they read are not those of the text."""

from __future__ import annotations

import weakref

from torch import nn

_thin: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def mark_thin(module: nn.Module, thin: bool) -> None:
    (_thin.add if thin else _thin.discard)(module)


def check_whole(module: nn.Module, who: str) -> None:
    """ValueError where the places of a call's tokens are not those of the text."""
    if module in _thin:
        raise ValueError(
            f"{who} counts places of the text, and tokens have left below a layer that it reads: leave the block in "
            f"which tokens leave, or change the layers below it alone"
        )
