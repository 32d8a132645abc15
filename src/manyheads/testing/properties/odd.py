"""Odd calls: passes that break off, tokens that hold no numbers, what belongs to another module or batch."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, each, expect, expect_close
from manyheads.testing.properties.prop import decodes, is_plane, is_sequence, must_raise, prop

NO_NUMBERS = (torch.nan, torch.inf, -torch.inf)


class _OutOfMemory(RuntimeError):
    pass


class _BreakOff(TorchDispatchMode):
    """Raises at the operator number `at`; counts them without."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count == self.at:
            raise _OutOfMemory
        self.count += 1
        return func(*args, **(kwargs or {}))


@prop("broken-off", "a pass that breaks off inside leaves the state as it was", sizes=(9,), when=decodes)
def broken_off(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    wanted, first = case.usual(n), n - n // 2
    for start in (0, first):
        state = module.init_state(2)
        if start:
            case.outputs(module, x[:, :start], context, state=state)
        rest, trial = x[:, start:], copy.deepcopy(state)
        with _BreakOff() as whole:
            case.outputs(module, rest, context, state=trial)
        for at in sorted({whole.count * part // 12 for part in range(1, 12)} | {whole.count - 1}):
            _break_off(case, module, rest, context, state, at)
        output = case.outputs(module, rest, context, state=state).output
        expect_close(
            output, wanted[:, start:], f"after passes from token {start} that broke off, the same pass differs"
        )


def _break_off(case: Case, module: Mechanism, x: Tensor, context: Any, state: Any, at: int) -> None:
    seen = state.length
    try:
        with _BreakOff(at):
            case.outputs(module, x, context, state=state)
    except _OutOfMemory:
        pass
    else:
        expect(False, f"operator {at} was not reached a second time")
    expect(
        state.length == seen, f"a pass that broke off at operator {at} is counted: {state.length} tokens, not {seen}"
    )


@prop(
    "no-numbers-ahead",
    "NaN or infinity in a token reaches no output before it",
    when=lambda c: c.pattern.causal,
    sizes=(2, 9, 33),
)
def no_numbers_ahead(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n, 1)
    cuts = [cut for cut in sorted({0, n // 2, n - 1}) for _ in NO_NUMBERS]
    rows = x.repeat(1 + len(cuts), 1, 1)
    for row, (cut, value) in enumerate(zip(cuts, itertools.cycle(NO_NUMBERS), strict=False)):
        rows[1 + row, cut, 0] = value
    # All in one batch, of whose rows the first holds numbers only, and must not know of the others.
    context = each(case.context(n, 1), lambda c: c.repeat(len(rows), 1, 1))
    clean, whole = case.usual(n, 1)[0], case.outputs(module, rows, context).output
    expect_close(whole[0], clean, "what is no number in other rows changed a row")
    for cut, given, dirty in zip(cuts, rows[1:], whole[1:], strict=True):
        value = float(given[cut, 0])
        expect_close(dirty[:cut], clean[:cut], f"{value} in token {cut} changed an output before it")
        expect(not bool(dirty[cut].isfinite().all()), f"{value} in token {cut} is hidden from its own output")
    if decodes(case):
        for cut in sorted(set(cuts) - {n - 1}):
            _stays_broken(case, module, rows, context, cut, whole[:, cut + 1 :])


def _stays_broken(case: Case, module: Mechanism, x: Tensor, context: Any, cut: int, whole: Tensor) -> None:
    """In a later pass as in one pass, of which `whole` is what came after the token."""
    state = module.init_state(len(x))
    case.outputs(module, x[:, : cut + 1], context, state=state)
    later = case.outputs(module, x[:, cut + 1 :], context, state=state).output
    same = bool((later.isfinite() == whole.isfinite()).all())
    expect(same, f"token {cut} held no number: what a later pass makes of it differs from one pass")


def _pads(case: Case) -> bool:
    return is_sequence(case) or is_plane(case) or case.pattern in (Pattern.POOL, Pattern.GRAPH)


@prop(
    "no-numbers-padded", "what stands in padding reaches nothing, be it NaN, infinity or 1e30", sizes=(2, 9), when=_pads
)
def no_numbers_padded(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)

    def mask_of(tensor: Tensor) -> Tensor:
        mask = torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
        mask[0, -1] = False
        return mask

    source = context if case.pattern.cross else x
    mask = each(source, mask_of)
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if case.pattern.cross else mask
    wanted = case.outputs(module, x, context, mask=mask).output
    for value in (*NO_NUMBERS, 1e30):
        filled = each(source, lambda t, v=value: t.masked_fill(~mask_of(t)[..., None], v))  # type: ignore[misc]
        given = (x, filled) if case.pattern.cross else (filled, context)
        output = case.outputs(module, *given, mask=mask).output
        if case.pattern is not Pattern.POOL and output.shape[:-1] == real.shape:
            output, wanted = (t.masked_fill(~real[..., None], 0.0) for t in (output, wanted))
        expect_close(output, wanted, f"{value} in padding changed what is real")


@prop("odd-arguments", "arguments of another batch, module or kind are refused", sizes=(3,))
def odd_arguments(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    must_raise("x that is a list", lambda: module(x.tolist(), context))
    must_raise("a mask that is a list", lambda: module(x, context, mask=[True] * n))
    if case.pattern in (Pattern.GRID, Pattern.VOLUME, Pattern.MAPS, Pattern.GRAPH):
        declared = case.cls.card.patterns
        if Pattern.GRID_CROSS not in declared and not any(p.cross for p in declared):
            must_raise("a context for a grid or graph", lambda: module(x, x.flatten(1, -2)))
        must_raise("something that it does not take", lambda: module(x, no_such_input=x))
        return
    wrong = torch.arange(n, device=x.device).repeat(3, 1)
    must_raise("positions of batch 3 for one of 2", lambda: module(x, context, positions=wrong))
    must_raise(
        "positions of batch 2 for one of 1", lambda: module(x[:1], each(context, lambda c: c[:1]), positions=wrong[:2])
    )
    must_raise("positions that are a list", lambda: module(x, context, positions=list(range(n))))
    must_raise("positions of booleans", lambda: module(x, context, positions=torch.ones(n, dtype=torch.bool)))
    if decodes(case):
        must_raise("a state of another width", lambda: module(x, context, state=_wider(case).init_state(2)))
        must_raise("a state that is a dict", lambda: module(x, context, state={}))
        must_raise("a state of 2.5 rows", lambda: module.init_state(2.5))  # type: ignore[arg-type]
        state = module.init_state(2)
        case.outputs(module, x, context, state=state)
        must_raise("truncate(2.5)", lambda: state.truncate(2.5))  # type: ignore[arg-type]


def _wider(case: Case) -> Mechanism:
    return case.cls(**{**case.settings, "dim": 2 * case.settings["dim"]})
