"""Which keys a query sees, drawn from the mechanism itself.

Cell (i, j) is dark where output i depends on input j for each of a few drawn inputs, light where it does for some of
them, as the content decides, and empty where it never does. Dependence is the gradient's: what steers a hard choice
alone does not show. Float64, random weights; small instances, as the card's example has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case

LENGTH, SIDE = 16, 7
_DRAWS = 3
# Beside the largest of a row: far above float64's rounding, also of transforms over the whole length.
_LEAST = 1e-9
# Beside the largest of all: a row below it depends on nothing, and what stands there is rounding, another on each
# processor (a softmax over one key is 1 whatever the query).
_ROUNDING = 1e-13
_SIZE = 4  # units a cell


@dataclass(frozen=True)
class Picture:
    """shares: [queries, keys], in how many of the draws a query sees a key. For a grid, a volume or maps one query's
    view: [height, width]. words: what rows and columns are."""

    pattern: str
    words: str
    shares: Tensor


def seen(cls: type[Mechanism]) -> list[Picture]:
    """A picture for each pattern that the card declares."""
    return [picture for pattern in sorted(cls.card.patterns) for picture in _drawn(cls, pattern)]


def _drawn(cls: type[Mechanism], pattern: Pattern) -> Iterator[Picture]:
    case = Case(cls, pattern)
    module = case.build()
    spatial = pattern in (Pattern.GRID, Pattern.GRID_CROSS, Pattern.VOLUME, Pattern.MAPS)
    n = SIDE if spatial else LENGTH
    total: Tensor | None = None
    for draw in range(_DRAWS):
        found = _dependence(module, case.x(n, 1, seed=draw), case.context(n - 2, 1, seed=100 + draw))
        total = found.double() if total is None else total + found
    assert total is not None
    shares = total / _DRAWS
    if spatial and not pattern.cross:
        sizes: tuple[int, ...] = module.map_sizes(n, n + 1)[0] if pattern is Pattern.MAPS else (n, n + 1)
        sizes = (*sizes, 2) if pattern is Pattern.VOLUME else sizes
        view = shares[_middle(sizes, len(shares))][: math.prod(sizes)].view(sizes)
        yield Picture(pattern.value, "the cells that one in the middle sees", view[..., 1] if view.ndim > 2 else view)
    elif pattern is Pattern.POOL:
        yield Picture(pattern.value, "the tokens that the result sees", shares)
    else:
        keys = "tokens of the context" if pattern.cross else "nodes" if pattern is Pattern.GRAPH else "tokens"
        yield Picture(pattern.value, f"down: queries; across: {keys} that they see", shares)


def _middle(sizes: tuple[int, ...], outputs: int) -> int:
    """The place of the output in the middle: of the first map, or of all where the result has another size."""
    place = 0
    for size in sizes:
        place = place * size + size // 2
    return place if outputs >= math.prod(sizes) else outputs // 2


def _dependence(module: Mechanism, x: Tensor, context: Any) -> Tensor:
    """[outputs, inputs] of booleans: which features of which input move which output at all. One pass over as many
    copies of the input as there are outputs, and one back from another output of each."""
    with torch.no_grad():
        output = module(x, context).output
    count = output.shape[1:-1].numel() if output.ndim > 2 else 1
    x = x.detach().repeat(count, *[1] * (x.ndim - 1)).requires_grad_()
    target = x
    if context is not None:
        parts = [context] if isinstance(context, Tensor) else list(context)
        parts = [part.detach().repeat(count, 1, 1) for part in parts]
        target = parts[0].requires_grad_()
        context = target if isinstance(context, Tensor) else tuple(parts)
    flat = module(x, context).output.reshape(count, count, -1).diagonal().T
    direction = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    (gradient,) = torch.autograd.grad((flat @ direction).sum(), target, allow_unused=True)
    if gradient is None:
        return torch.zeros(count, target.shape[1:-1].numel(), dtype=torch.bool)
    sizes = gradient.flatten(1, -2).abs().amax(-1).nan_to_num()
    return (sizes > _LEAST * sizes.amax(1, keepdim=True)) & (sizes > _ROUNDING * sizes.max())


def svg(pictures: list[Picture], name: str) -> str:
    """The pictures side by side, with no script and nothing from outside."""
    parts, left, tall = [], 0, 0
    for picture in pictures:
        rows, columns = picture.shares.shape
        label = f'<text x="{left}" y="9">{picture.pattern}</text>'
        cells = f'<g transform="translate({left} 14)"><path d="{_outline(rows, columns)}"/>{_cells(picture.shares)}</g>'
        parts.append(label + cells)
        left += max(columns * _SIZE, 8 * len(picture.pattern) * 6 // 10) + 16
        tall = max(tall, rows * _SIZE)
    width, height = max(left - 8, 1), tall + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 0 {width} {height}" width="{2 * width}" '
        f'height="{2 * height}" role="img" aria-label="{name}: who sees whom">'
        "<style>text{font:8px sans-serif;fill:#68727d}path{fill:none;stroke:#a9b3bd;stroke-width:.5}"
        f".a,.b{{stroke:#0072b2;stroke-width:{_SIZE}}}.b{{stroke-opacity:.35}}</style>" + "".join(parts) + "</svg>\n"
    )


def _outline(rows: int, columns: int) -> str:
    return f"M0 0h{columns * _SIZE}v{rows * _SIZE}h-{columns * _SIZE}z"


def _cells(shares: Tensor) -> str:
    """Runs of equal cells as strokes as wide as a cell: a path for what is always seen, and one for sometimes."""
    paths = ""
    for kind, held in (("a", shares >= 1), ("b", (shares > 0) & (shares < 1))):
        d = "".join(f"M{_SIZE * j} {_SIZE * i + _SIZE // 2}h{_SIZE * wide}" for i, j, wide in _runs(held))
        paths += f'<path class="{kind}" d="{d}"/>' if d else ""
    return paths


def _runs(held: Tensor) -> Iterator[tuple[int, int, int]]:
    for i, row in enumerate(held.tolist()):
        start = 0
        while start < len(row):
            stop = start
            while stop < len(row) and row[stop] == row[start]:
                stop += 1
            if row[start]:
                yield i, start, stop - start
            start = stop
