"""What a mechanism is, as data. What can be computed (stages, parameters, bytes, exponents) is not typed here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class Pattern(StrEnum):
    """What a mechanism is called with, and what may influence which output.

    causal-self: output i depends on x[:i + 1] only. causal-cross: output i depends on x[:i + 1] and on the whole
    context. grid: x is [batch, height, width, dim]; grid-cross: and a context beside it. volume: x is [batch, depth,
    height, width, dim]. maps: x is several grids or volumes, each of its own size and features. graph: x is [batch, n,
    dim], and who sees whom is a list of edges [2, e], sources above targets. pool: the result is [batch, dim].
    """

    NONCAUSAL_SELF = "noncausal-self"
    CAUSAL_SELF = "causal-self"
    NONCAUSAL_CROSS = "noncausal-cross"
    CAUSAL_CROSS = "causal-cross"
    GRID = "grid"
    GRID_CROSS = "grid-cross"
    VOLUME = "volume"
    MAPS = "maps"
    POOL = "pool"
    GRAPH = "graph"

    @property
    def causal(self) -> bool:
        return self.value.startswith("causal")

    @property
    def cross(self) -> bool:
        return self.value.endswith("cross")


class Family(StrEnum):
    """The folders under `mechanisms/`, and `plain` for the shell with no stage changed."""

    PLAIN = "plain"
    PROJECTION = "projection"
    POSITION = "position"
    SELECTION = "selection"
    SCORING = "scoring"
    MIXING = "mixing"
    LINEAR = "linear"
    RECURRENT = "recurrent"
    CONVOLUTION = "convolution"
    TOKENS = "tokens"
    GRID = "grid"
    CROSS = "cross"
    POOLING = "pooling"
    GRAPH = "graph"
    MEMORY = "memory"


# What processes that hold parts of a sequence give each other: all keys and values in turn, the tokens of some heads,
# what was summed into a memory, or the tokens before one's own.
PARALLEL = ("ring", "heads", "state", "halo")


@dataclass(frozen=True, kw_only=True)
class Card:
    """name: lower case with hyphens. reference: `arXiv:2502.13189`, a DOI or a citation. time, state: growth in the
    length n, as formulas (`n^2`, `n w`, `1`). decodes: a pass with a state continues the one before. example: extra
    constructor arguments that make a small instance for tests. takes: what a call is given by name beside x, with its
    shape: labels, boxes on a page, edge features; what begins with "optional" may be left out. resizes: the
    factor from the height and width of x to those of the result (`1 / stride`), empty where they stay. parallel: how
    one sequence is spread over processes, one of `PARALLEL`; None where it cannot be. notes: what a user should know
    before choosing it.
    """

    name: str
    title: str
    reference: str
    family: str  # a Family, or its name: what is kept is the Family
    patterns: Set[Any]  # of Pattern, or of their names
    time: str
    state: str
    decodes: bool = True
    example: Mapping[str, Any] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=dict)
    resizes: str = ""
    parallel: str | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(
                f"card name {self.name!r}: want lower-case words joined by hyphens, such as 'my-attention'"
            )
        if not self.patterns:
            raise ValueError(
                f"card {self.name!r} declares no pattern; want one or more of {[p.value for p in Pattern]}"
            )
        if self.parallel not in (None, *PARALLEL):
            raise ValueError(f"card {self.name!r}: parallel={self.parallel!r}; want one of {list(PARALLEL)}, or None")
        object.__setattr__(self, "family", Family(self.family))
        object.__setattr__(self, "patterns", frozenset(Pattern(p) for p in self.patterns))
        object.__setattr__(self, "example", MappingProxyType(dict(self.example)))
        object.__setattr__(self, "takes", MappingProxyType(dict(self.takes)))

    def __hash__(self) -> int:
        return hash(self.name)
