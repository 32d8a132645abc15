"""Every published attention mechanism behind one contract: compare, shrink, convert, explain."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manyheads.announce import announce
from manyheads.card import Card, Family, Pattern

if TYPE_CHECKING:
    from manyheads.functional.rotary import Rotary
    from manyheads.mechanism import Call, Mechanism, Result
    from manyheads.registry import create_attention, list_attentions, mechanism_class, register
    from manyheads.shell import Shell
    from manyheads.softmax import SoftmaxAttention, Where
    from manyheads.state import State

__version__ = "0.1.0"
__all__ = [
    "Call",
    "Card",
    "Family",
    "Mechanism",
    "Pattern",
    "Result",
    "Rotary",
    "Shell",
    "SoftmaxAttention",
    "State",
    "Where",
    "card",
    "create_attention",
    "list_attentions",
    "mechanism_class",
    "register",
]

# What needs torch is imported when it is asked for: the command line answers from files that ship, in a second.
_HOMES = {
    "manyheads.functional.rotary": ("Rotary",),
    "manyheads.mechanism": ("Call", "Mechanism", "Result"),
    "manyheads.registry": ("create_attention", "list_attentions", "mechanism_class", "register"),
    "manyheads.shell": ("Shell",),
    "manyheads.softmax": ("SoftmaxAttention", "Where"),
    "manyheads.state": ("State",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def card(name: str) -> Card:
    """The card of the mechanism called `name`."""
    from manyheads.registry import mechanism_class

    return mechanism_class(name).card


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(_HOME_OF[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


announce()
