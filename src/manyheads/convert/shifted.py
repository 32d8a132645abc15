"""Linear layers whose weights are powers of two: every product in them is a shift and a sign.

    w -> sign(w) 2^round(log2 |w|), |w| within 2^-(2^(bits - 1) - 1) and 1; zero stays zero

`bits` of them say sign and shift: five in the paper, shifts 0 to 15. Weights above one become one, as in the released
code. While such a model is trained its weights move freely and are rounded in every pass, with the gradient of the
rounded weight handed to the free one; `settled` leaves the rounded ones, in the class that the model had.

Source: You et al., ShiftAddViT, arXiv:2306.06446, stage 2, and its `deepshift/modules_q.py`, whose rounding of inputs
to 32 bits by the largest of the batch is left out. Embeddings and the head stay as they are. No time is saved by torch
or any engine that multiplies; the weights fit into `bits` each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.convert.layout import check_bare

BITS = 5


def powers_of_two(weight: Tensor, bits: int = BITS) -> Tensor:
    """The nearest power of two of each weight, by its logarithm, with its sign."""
    lowest = -(2 ** (bits - 1) - 1)
    shift = weight.abs().clamp(2.0**lowest, 1.0).log2().round()
    return weight.sign() * shift.exp2()


class ShiftLinear(nn.Linear):
    """A linear layer whose weight is rounded in every pass, with the gradient as if it were not."""

    bits: int

    @classmethod
    def of(cls, linear: nn.Linear, bits: int) -> ShiftLinear:
        """With the same parameters, and not copies of them."""
        made = cls(1, 1, bias=False)
        made.in_features, made.out_features, made.bits = linear.in_features, linear.out_features, bits
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        rounded = powers_of_two(self.weight, self.bits)
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


def check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"--bits {bits}: want 2 to 8, a sign and the places of a shift")


def check_shifted(model: Any, bits: int) -> None:
    """ValueError where the model has no linear layer to turn, or the bits say nothing."""
    check_bits(bits)
    check_bare(model)
    if not list(linears(model)):
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear inside its layers")


def linears(model: Any) -> Iterator[nn.Linear]:
    """Those of the layers: all but the output head, whose weights the embeddings may share."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = getattr(model, "classifier", None) if head is None else head
    return (part for part in model.modules() if type(part) is nn.Linear and part is not head)


def shifted(model: Any, bits: int = BITS) -> Any:
    """The model, language or vision, with every linear layer but its head made of shifts; the given one is left as it
    is. Call `settled` before it is saved."""
    check_shifted(model, bits)
    made = copy.deepcopy(model)
    put_shifts(made, set(linears(made)), bits)
    return made


def put_shifts(model: nn.Module, turned: set[nn.Linear], bits: int) -> None:
    """Linear layers of shifts in place of these, where they stand."""
    _replace(model, lambda part: ShiftLinear.of(part, bits) if part in turned else part)


@torch.no_grad()
def settled(model: Any) -> Any:
    """The rounded weights in place of the free ones, in a model like the one that was given to `shifted`."""
    made = copy.deepcopy(model)
    _replace(made, lambda part: _plain(part) if isinstance(part, ShiftLinear) else part)
    return made


def _plain(part: ShiftLinear) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False)
    made.in_features, made.out_features, made.bias = part.in_features, part.out_features, part.bias
    made.weight = nn.Parameter(powers_of_two(part.weight, part.bits), part.weight.requires_grad)
    return made.train(part.training)


def _replace(model: nn.Module, other: Callable[[nn.Module], nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            new = other(part)
            if new is not part:
                setattr(parent, name, new)
