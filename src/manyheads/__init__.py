"""Every published attention mechanism behind one contract: compare, shrink, convert, explain."""

from manyheads.announce import announce
from manyheads.card import Card, Family, Pattern
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import card, create_attention, list_attentions, mechanism_class, register
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

announce()
