"""What a model is given beside its tokens, one entry for each, for the layers whose mechanism takes it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.card import Card, Pattern

Beside = Mapping[str, Tensor]
NOTHING: Beside = MappingProxyType({})
GIVEN = ("token_kinds", "boxes")  # what models are given
ALONG = ("labels",)  # and, with the edges of a graph, what is said of each of them
HAD = (*GIVEN, "earlier", "weights_below")  # and what a stack has itself, outputs and weights of the layers below


def read_beside(x: Tensor, **given: Tensor | None) -> Beside:
    """What of it was given, each [b, n, ...] for x [b, n, e], the tokens of this pass."""
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.shape[:2] != x.shape[:2] or value.device != x.device:
            what = f"{list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name}: got {what}; want a tensor {list(x.shape[:2])} and more on {x.device}, one entry for each "
                "token of this pass, without those that a cache has seen"
            )
    return found


class Reader(NamedTuple):
    """Who reads what by name, each with its shape in words, as in a card's `takes`."""

    name: str
    takes: Mapping[str, str]


def check_beside(given: Beside, readers: Sequence[Reader]) -> None:
    """Raises ValueError, naming the reader, where one takes what was not given, or none takes what was. Edges, and what
    goes along with them, are for whoever wants them."""
    for reader in readers:
        for name in (name for name in (*GIVEN, *ALONG) if name in reader.takes):
            if name not in given and not reader.takes[name].startswith("optional"):
                raise ValueError(
                    f"{reader.name}, takes {name} ({reader.takes[name]}); the model was not given any: call it with "
                    f"{name}=, where it has this argument"
                )
    taken = {name for reader in readers for name in reader.takes}
    strange = sorted(given.keys() - taken - {"edges", *ALONG})
    if strange:
        raise ValueError(f"{strange[0]} was given, and no layer takes it; leave it out")


def below(i: int, card: Card, outputs: list[Tensor]) -> Tensor | None:
    """The outputs of the layers below layer i, [b, n, i, e], where its card takes them as `earlier`."""
    if "earlier" not in card.takes:
        return None
    if not outputs:
        raise ValueError(f"layer {i}, {card.name}, takes the outputs of the layers below it, and there are none")
    return torch.stack(outputs, 2)


def weights_below(i: int, card: Card, weights: list[Tensor | None]) -> Tensor | None:
    """The weights of the layer below layer i, where its card takes them."""
    if "weights_below" not in card.takes:
        return None
    if not weights:
        raise ValueError(f"layer {i}, {card.name}, takes the weights of the layer below it, and there is none")
    return weights[-1]


def without_place(card: Card, pattern: Pattern, also: Sequence[str] = ()) -> str | None:
    """What a mechanism must be given that a model has not got at a place called so, which has what `also` names
    besides; None where it has all."""
    each = {Pattern.POOL: ("earlier",), Pattern.GRAPH: ALONG} | dict.fromkeys(
        (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF), HAD
    )
    had = (*each.get(pattern, ()), *also)
    for name, what in card.takes.items():
        if name not in had and not what.startswith("optional"):
            return f"{card.name} takes {name} ({what}), which no model passes to a layer that is {pattern.value}"
    return None


def continued(values: Tensor, tokens: int) -> Tensor:
    """values [b, n, ...] and as many more, like the last of each row."""
    last = values[:, -1:]
    return torch.cat([values, *[last] * tokens], 1)


def of_last(name: str, values: Any, seen: int, tokens: Tensor) -> Tensor:
    """For tokens [b, n, ...] behind those that a cache has seen, of values for all of them."""
    total = seen + tokens.shape[1]
    if not isinstance(values, Tensor) or values.ndim < 2 or values.shape[1] != total:
        what = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"generate: {name} is {what}; want one for each of the {total} tokens so far (with an assistant, or a "
            "prompt in chunks, there is no saying what belongs to the tokens tried)"
        )
    return values[:, total - tokens.shape[1] :]
