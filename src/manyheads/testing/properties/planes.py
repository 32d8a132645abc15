"""What must hold on maps of odd sizes, with the arguments that a mechanism has where none are given, and of several
maps that do not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, Violation, expect, expect_close
from manyheads.testing.fed import feed
from manyheads.testing.properties.prop import prop

# One cell, one row, an even side beside an odd one, and more cells than most windows have.
SIZES = ((1, 1), (1, 5), (3, 2), (9, 7))
AROUND = (10, 9)


def _is_plane(case: Case) -> bool:
    return case.pattern in (Pattern.GRID, Pattern.VOLUME)


def _at_defaults(case: Case) -> Mechanism:
    """The mechanism with nothing but a width and heads, whichever of a few it can be built with; where there are
    none, with as much of the card's example as it needs."""
    example, error = case.cls.card.example, None
    heads = {key: example[key] for key in ("heads",) if key in example}
    for given in ({}, heads, *({key: example[key]} | heads for key in example), example):
        for dim in (example.get("dim", 16), 64):
            try:
                settings = {"heads": 4, **given, **case.config, "dim": dim, "causal": False}
                return _filled(case.cls(**settings), case)
            except ValueError as refused:
                error = refused
    raise Violation(f"neither its defaults nor its example can be built: {error}")


def _filled(module: Mechanism, case: Case) -> Mechanism:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return feed(module.to(case.device, torch.float64).eval(), case.pattern)


@prop(
    "small-maps",
    "at its defaults a map smaller than a window, of odd sides or of one cell is as it is within padding, or refused",
    sizes=(1,),
    when=_is_plane,
)
def small_maps(case: Case, n: int) -> None:
    with torch.random.fork_rng(devices=[]):
        case.seeds(2)
        module = _at_defaults(case)
    deep = (2,) if case.pattern is Pattern.VOLUME else ()
    for size in SIZES:
        shape, around = (*deep, *size), (*deep, *AROUND)
        generator = torch.Generator().manual_seed(sum(size))
        x = torch.randn(2, *around, module.dim, generator=generator, dtype=torch.float64).to(case.device)
        there = torch.zeros(2, *around, dtype=torch.bool, device=case.device)
        inside = (slice(None), *(slice(side) for side in shape))
        there[inside] = True
        small = _answered(module, x[inside])
        if small is None:
            continue
        wanted = (2, *module.result_size(*shape), module.result_dim or module.dim)
        expect(tuple(small.shape) == wanted, f"a map of {shape} gives {tuple(small.shape)}, want {wanted}")
        expect(bool(small.isfinite().all()), f"a map of {shape} gives values that are not finite")
        padded = _answered(module, x, mask=there)
        if padded is not None:
            real = padded[(slice(None), *(slice(side) for side in wanted[1:-1]))]
            expect_close(real, small, f"a map of {shape} within padding of {around} differs from it alone")


def _answered(module: Mechanism, x: Any, **call: Any) -> Any:
    """The output, or None where the call is refused in words that name the mechanism."""
    try:
        with torch.no_grad():
            return module(x, **call).output
    except ValueError as error:
        expect(module.card.name in str(error), f"refused without its name: {error}")
        return None


@prop(
    "misfit-maps",
    "maps of sizes that do not fit together are refused by name, or give all that the sizes promise",
    sizes=(4, 7),
    when=lambda c: c.pattern is Pattern.MAPS,
)
def misfit_maps(case: Case, n: int) -> None:
    with torch.random.fork_rng(devices=[]):
        case.seeds(2)
        module = case.cls(**case.settings).to(case.device, torch.float64).eval()
    sizes = module.map_sizes(n, n + 1)
    for which, wrong in _misfits(sizes):
        maps = _maps(module, wrong, case)
        output = _answered(module, maps, **_beside(module, wrong))
        if output is None:
            continue
        promised = module.result_size(*wrong)
        promised = (promised,) if isinstance(promised[0], int) else promised
        found = (output,) if isinstance(output, Tensor) else output
        given = [tuple(one.shape[1:-1]) for one in found]
        expect(given == [tuple(own) for own in promised], f"map {which} of {wrong}: result {given}, not {promised}")
        expect(all(bool(one.isfinite().all()) for one in found), f"map {which} of {wrong}: not finite")
    broken = list(_maps(module, sizes, case))
    for which, one in enumerate(broken):
        for what, changed in (("batch", one[:1]), ("features", one[..., :-1]), ("axes", one[:, 0])):
            maps = (*broken[:which], changed, *broken[which + 1 :])
            taken = len(broken) > 1 or what != "batch"
            expect(not taken or _answered(module, maps, **_beside(module, sizes)) is None, f"other {what} of a map")


def _misfits(sizes: Any) -> Iterator[tuple[int, Any]]:
    """One map after the other, larger by a row, smaller by two, or of one cell."""
    for which, (height, width) in enumerate(sizes):
        for other in ((height + 1, width), (height, max(width - 2, 1)), (1, 1)):
            yield which, tuple(other if i == which else own for i, own in enumerate(sizes))


def _maps(module: Mechanism, sizes: Any, case: Case) -> tuple[Tensor, ...]:
    widths = module.map_dims or (module.dim,) * len(sizes)
    generator = torch.Generator().manual_seed(5)
    deep = (2,) * (module.map_axes - 2)
    return tuple(
        torch.randn(2, *deep, *size, wide, generator=generator, dtype=torch.float64).to(case.device)
        for size, wide in zip(sizes, widths, strict=True)
    )


def _beside(module: Mechanism, sizes: Any) -> dict[str, Tensor]:
    cells = sum(height * width for height, width in sizes)
    own = module.example_inputs(cells)
    return {
        key: (value.to(torch.float64) if value.is_floating_point() else value).expand(2, *value.shape[1:])
        for key, value in own.items()
    }
