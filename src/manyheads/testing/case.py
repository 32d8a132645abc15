"""One mechanism under one pattern: builds small instances and inputs for the properties."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism, Result
from manyheads.testing.fed import feed

Oracle = Callable[[Mechanism, Tensor, Any], Tensor]


class Violation(AssertionError):
    """A property does not hold; the message says on which input."""


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise Violation(message)


def expect_close(actual: Tensor, wanted: Tensor, message: str, *, tolerance: float = 1e-8) -> None:
    expect(actual.shape == wanted.shape, f"{message}: shapes {tuple(actual.shape)} and {tuple(wanted.shape)}")
    alike = actual.dtype == wanted.dtype and actual.device == wanted.device and actual.is_floating_point()
    if alike and actual.numel() and bool((actual - wanted).abs().max() <= tolerance):
        return  # what assert_close asks next takes as long as a small pass
    try:
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    except AssertionError:
        gap = (actual - wanted).abs()
        place = tuple(int(i) for i in torch.unravel_index(gap.nan_to_num(torch.inf).argmax(), gap.shape))
        raise Violation(f"{message}: largest difference {gap.max().item():.3g}, at {list(place)}") from None


@dataclass(frozen=True)
class Case:
    """cls under pattern. config: constructor arguments beside the card's example. oracle: (module, x, context) ->
    output, an independent computation, where the caller has one."""

    cls: type[Mechanism]
    pattern: Pattern
    config: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    oracle: Oracle | None = None
    _kept: dict[torch.dtype, Mechanism] = field(default_factory=dict, init=False, repr=False, compare=False)
    _usual: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        return {"dim": 16, "heads": 4, **self.cls.card.example, **self.config, "causal": self.pattern.causal}

    def seeds(self, number: int) -> None:
        """Seeds the generators that the case draws from. (torch.manual_seed notes the call stack for each device that
        is not there: more time than a small pass takes.)"""
        on_cpu = torch.device(self.device).type == "cpu"
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(number)

    def build(self, dtype: torch.dtype = torch.float64, *, random: bool = True) -> Mechanism:
        """A small instance in eval mode, the same every time. random: adds noise to every parameter, so that no zero
        or identity initialisation hides a path."""
        return feed(self.unfed(dtype, random=random), self.pattern)

    def unfed(self, dtype: torch.dtype = torch.float64, *, random: bool = True) -> Mechanism:
        """What `build` gives without its hooks: it wants all that the card takes, and maps in a tuple."""
        with torch.random.fork_rng(devices=[]):
            self.seeds(1)
            module = self.cls(**self.settings)
            if random:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
        return module.to(device=self.device, dtype=dtype).eval()

    def shared(self, dtype: torch.dtype = torch.float64) -> Mechanism:
        """What `build` gives, made once for all who only pass through it in eval mode: nothing may be left in it, so
        that one call after another, of other sizes, must give what a new module gives."""
        if dtype not in self._kept:
            self._kept[dtype] = self.build(dtype)
        return self._kept[dtype]

    def x(self, n: int, batch: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """[batch, n, dim], for a grid [batch, n, n + 1, dim] and for a volume [batch, n, n + 1, 2, dim], of at most
        twelve rows; maps as one tensor, which `build` takes apart again."""
        side, dim = min(n, 12), self.settings["dim"]
        shape: tuple[int, ...] = (n,)
        if self.pattern in (Pattern.GRID, Pattern.GRID_CROSS):
            shape = (side, side + 1)
        elif self.pattern is Pattern.VOLUME:
            shape = (side, side + 1, 2)
        elif self.pattern is Pattern.MAPS:
            module = self.shared()
            shape = (sum(height * width for height, width in module.map_sizes(side, side + 1)),)
            dim = max(module.map_dims or (dim,))
        return self._noise(batch, *shape, dim=dim, dtype=dtype, seed=seed)

    def context(self, n: int, batch: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 100) -> Any:
        """None, [batch, n + 2, dim], or a tuple of such, each of its own length, where there are several sources."""
        if not self.pattern.cross:
            return None
        module = self.shared()
        sources, dim = module.sources, module.source_dim or module.dim
        parts = [self._noise(batch, n + 2 + s, dim=dim, dtype=dtype, seed=seed + s) for s in range(sources)]
        return parts[0] if sources == 1 else tuple(parts)

    def _noise(self, batch: int, *shape: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
        # Row by row, so that a batch of one is the first row of a larger batch.
        rows = [_row((*shape, dim), 1000 * seed + row) for row in range(batch)]
        return torch.stack(rows).to(device=self.device, dtype=dtype)

    def outputs(self, module: Mechanism, x: Tensor, context: Any = None, **call: Any) -> Result:
        with torch.no_grad():
            return module(x, context, **call)

    def usual(self, n: int, batch: int = 2) -> Tensor:
        """What `shared` makes of x and context, in float64, computed once for all who compare with it."""
        if (n, batch) not in self._usual:
            self._usual[n, batch] = self.outputs(self.shared(), self.x(n, batch), self.context(n, batch)).output
        return self._usual[n, batch]


@functools.lru_cache(maxsize=1024)
def _row(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def each(context: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` on a context, on each of several, or nothing on None."""
    if context is None:
        return None
    return change(context) if isinstance(context, Tensor) else tuple(change(part) for part in context)
