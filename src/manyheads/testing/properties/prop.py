"""How a property is written down, and what several of them use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.testing.case import Case, Violation
from manyheads.testing.fed import map_sizes

# Around the blocks of four that the cards' examples have: within one, one token past one and past two, and many.
SIZES = (1, 2, 5, 9, 33)
SEQUENCES = (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)


@dataclass(frozen=True)
class Property:
    name: str
    claim: str
    check: Callable[[Case, int], None]
    sizes: tuple[int, ...]
    applies: Callable[[Case], bool]


PROPERTIES: list[Property] = []


def prop(
    name: str, claim: str, *, sizes: tuple[int, ...] = SIZES, when: Callable[[Case], bool] = lambda case: True
) -> Callable[[Callable[[Case, int], None]], Callable[[Case, int], None]]:
    def keep(check: Callable[[Case, int], None]) -> Callable[[Case, int], None]:
        PROPERTIES.append(Property(name, claim, check, sizes, when))
        return check

    return keep


def is_sequence(case: Case) -> bool:
    return case.pattern in SEQUENCES


def is_plane(case: Case) -> bool:
    return case.pattern in (Pattern.GRID, Pattern.GRID_CROSS, Pattern.VOLUME, Pattern.MAPS)


def result_shape(case: Case, module: Any, x: Tensor) -> tuple[int, ...]:
    """What the output of x must look like."""
    dim = module.result_dim or module.dim
    if case.pattern is Pattern.POOL:
        return (x.shape[0], dim)
    if case.pattern is not Pattern.MAPS:
        return (x.shape[0], *(module.result_size(*x.shape[1:-1]) if is_plane(case) else x.shape[1:-1]), dim)
    size = module.result_size(*map_sizes(module, x.shape[1]))
    if isinstance(size[0], int):
        return (x.shape[0], *size, dim)
    wide = module.result_dim or max(module.map_dims or (dim,))
    return (x.shape[0], sum(height * width for height, width in size), wide)


def decodes(case: Case) -> bool:
    return case.pattern.causal and case.cls.card.decodes


def padded(tensor: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Garbage behind each row's length, and the mask that says so."""
    mask = (
        torch.arange(tensor.shape[1], device=tensor.device)[None] < torch.tensor(lengths, device=tensor.device)[:, None]
    )
    return torch.where(mask[..., None], tensor, 1e3 * tensor.flip(1) + 50.0), mask


def everything(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)


def must_raise(what: str, call: Callable[[], Any], kinds: tuple[type[Exception], ...] = (ValueError,)) -> None:
    try:
        call()
    except kinds:
        return
    except Exception as error:
        raise Violation(f"{what} raises {type(error).__name__} instead of ValueError: {error}") from None
    raise Violation(f"{what} is accepted in silence")
