"""Mechanisms that are made to take over a trained layer: what they begin with, and when they are softmax's equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from manyheads.registry import mechanism_class

# Tokens of the text on which identities are tried.
TRIED = 64


@dataclass(frozen=True)
class Case:
    """begins: arguments in place of the mechanism's own defaults. learns: the loss of attention transfer. whole: of the
    spec and the number of heads, the arguments with which it computes what softmax attention with the same weights
    does, on TRIED tokens."""

    whole: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
    begins: Mapping[str, Any] = field(default_factory=dict)
    learns: str = "output"


def _wide(spec: Mapping[str, Any], heads: int) -> Mapping[str, Any]:
    return {"window": TRIED}


def _all_heads(spec: Mapping[str, Any], heads: int) -> Mapping[str, Any]:
    return {"active_heads": heads - _shared(spec, heads)}


def _shared(spec: Mapping[str, Any], heads: int) -> int:
    """Half the heads, as in MoH-LLaMA."""
    return int(spec.get("shared_heads", heads // 2))


CASES: Mapping[str, Case] = {
    "hedgehog": Case(_wide, learns="heads"),
    # Continue-tuning begins without a router: a new one would turn heads off at random (arXiv:2410.11842).
    "moh": Case(_all_heads, {"routing": "query-norm"}),
    "cca": Case(_wide),
    "mswa": Case(lambda spec, heads: {"window": 4 * TRIED}),
}


def case_spec(
    spec: Mapping[str, Any], heads: int, *, window: int | None = None, active: float | None = None
) -> dict[str, Any]:
    """The spec as it takes over a layer of so many heads. window: its argument of this name. active: the share of all
    heads that are on, those that always are included. ValueError where the mechanism has no such thing."""
    name, takes = spec["name"], inspect.signature(mechanism_class(spec["name"])).parameters
    case = CASES.get(name)
    made = {**({} if case is None else case.begins), **spec}
    for option, value, key in (("--window", window, "window"), ("--active", active, "active_heads")):
        if value is None:
            continue
        if key not in takes:
            raise ValueError(f"{option} belongs to a mechanism with {key}, and --to {name} was given")
        if key in spec:
            raise ValueError(f"{option} and {key}={spec[key]} of --to {name} say the same: give one of them")
    if window is not None:
        if window < 1:
            raise ValueError(f"--window {window}: want a number of tokens, 1 or more")
        made["window"] = window
    if active is not None:
        shared = _shared(spec, heads)
        count = round(active * heads) - shared
        if not 1 <= count <= heads - shared:
            raise ValueError(
                f"--active {active}: of {heads} heads {shared} are always on; want a share from "
                f"{(shared + 1) / heads:.3g} to 1"
            )
        made |= {"shared_heads": shared, "active_heads": count}
    return made


def default_loss(spec: Mapping[str, Any]) -> str:
    case = CASES.get(spec["name"])
    return "output" if case is None else case.learns


def as_softmax(spec: Mapping[str, Any], heads: int) -> dict[str, Any] | None:
    """The spec with which its mechanism computes softmax attention, None where there is none."""
    case = CASES.get(spec["name"])
    if case is None or spec.get("routing") == "learned":
        return None
    return {**spec, **case.whole(spec, heads)}
