"""Who may see whom: causality, batches, padding and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.testing.case import Case, each, expect, expect_close
from manyheads.testing.properties.prop import (
    everything,
    is_sequence,
    padded,
    prop,
)


@prop("no-future", "output i does not change when any later token does", when=lambda c: c.pattern.causal)
def no_future(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n, 1)
    cuts = [cut for cut in sorted({1, n // 2, n - 1} - {0, n}) for _ in range(3)]
    rows = x.repeat(1 + len(cuts), 1, 1)
    for row, cut in enumerate(cuts):
        rows[1 + row, cut:] = 10.0 ** (row % 3) * case.x(n - cut, 1, seed=7 + row % 3)[0]
    # All in one batch, whose rows the property of that name holds apart.
    context = each(case.context(n, 1), lambda c: c.repeat(len(rows), 1, 1))
    clean, *dirty = case.outputs(module, rows, context).output.unbind()
    for cut, output in zip(cuts, dirty, strict=True):
        message = f"tokens from {cut} on were changed, and an output before them changed (a leak from the future)"
        expect_close(output[:cut], clean[:cut], message)


@prop(
    "no-future-training", "nor in training mode, for the same draws", sizes=(2, 9, 33), when=lambda c: c.pattern.causal
)
def no_future_training(case: Case, n: int) -> None:
    context, cut = case.context(n), n // 2
    for trial in range(3):
        x = case.x(n, seed=trial)
        changed = x.clone()
        changed[:, cut:] = 10 * case.x(n - cut, seed=7 + trial)
        clean, dirty = (_trained_output(case, tokens, context) for tokens in (x, changed))
        message = f"tokens from {cut} on were changed in training mode, and an output before them changed"
        expect_close(dirty[:, :cut], clean[:, :cut], message)


def _trained_output(case: Case, x: Tensor, context: Any) -> Tensor:
    """Of the first pass of a new module: what a pass moves (centroids, averages) stays in it."""
    module = case.build().train()
    with torch.random.fork_rng(devices=[]):
        case.seeds(2)
        return case.outputs(module, x, context).output


@prop("sees-all", "without causality, or in the context, later tokens do matter", sizes=(4, 9))
def sees_all(case: Case, n: int) -> None:
    if case.pattern.causal and not case.pattern.cross:
        return _sees_past(case, n)
    module = case.shared()
    x, clean = case.x(n, 1), case.usual(n, 1)
    if case.pattern.cross:
        other = case.outputs(module, x, case.context(n, 1, seed=900)).output
        return expect(bool((other - clean).abs().max() > 1e-9), "another context gives the same output")
    changed = x.clone()
    changed[:, -1] = case.x(n, 1, seed=5)[:, -1]
    other = case.outputs(module, changed).output
    one = case.pattern is Pattern.POOL or clean.shape[1] == 1  # all in one: nothing of it is earlier
    early = (other - clean).flatten(1) if one else (other - clean)[:, :-1]
    return expect(bool(early.abs().max() > 1e-9), "changing the last token changes no earlier output")


def _sees_past(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n, 1)
    changed = x.clone()
    changed[:, 0] = case.x(n, 1, seed=5)[:, 0]
    gap = (case.outputs(module, changed).output - case.usual(n, 1))[:, 1:]
    expect(bool(gap.abs().max() > 1e-9), "changing the first token changes no later output")


@prop("batch", "rows of a batch do not influence each other, nor does non-finite input in another row")
def batch(case: Case, n: int) -> None:
    module = case.shared()
    x, context, together = case.x(n, 3), case.context(n, 3), case.usual(n, 3)
    for row in range(3):
        alone = case.outputs(module, x[row : row + 1], each(context, lambda c, r=row: c[r : r + 1])).output  # type: ignore[misc]
        expect_close(together[row : row + 1], alone, f"row {row} of 3 differs from the same row alone")
    broken = x.clone()
    broken[1, 0] = torch.nan
    dirty = case.outputs(module, broken, context).output
    expect_close(dirty[0], together[0], "NaN in row 1 changed row 0")
    first = dirty[1] if case.pattern is Pattern.POOL else dirty[1, 0]
    expect(bool(first.isnan().any()), "NaN in the first token is hidden from its output")


@prop("padding", "padded tokens take no weight, whatever stands there", sizes=(2, 5, 9, 33), when=is_sequence)
def padding(case: Case, n: int) -> None:
    module = case.shared()
    x, context = case.x(n), case.context(n)
    lengths = [n - n // 2, n - 1]
    given: Any
    mask: Any
    if case.pattern.cross:
        parts = (context,) if isinstance(context, Tensor) else context
        pairs = [padded(part, lengths) for part in parts]
        given, mask = tuple(p for p, _ in pairs), tuple(m for _, m in pairs)
        given, mask = (given[0], mask[0]) if isinstance(context, Tensor) else (given, mask)
    else:
        given, mask = padded(x, lengths)
    for row, length in enumerate(lengths):
        if case.pattern.cross:
            output = case.outputs(module, x, given, mask=mask).output[row]
            short = each(context, lambda c, r=row, k=length: c[r : r + 1, :k])  # type: ignore[misc]
            wanted = case.outputs(module, x[row : row + 1], short).output[0]
        else:
            output = case.outputs(module, given, mask=mask).output[row, :length]
            wanted = case.outputs(module, x[row : row + 1, :length]).output[0]
        expect_close(output, wanted, f"row {row}, {length} of {n} tokens real: differs from the row without padding")


def _is_pool(case: Case) -> bool:
    return case.pattern is Pattern.POOL


@prop("pool-padding", "padded tokens take no weight in a pool", sizes=(2, 3, 5, 9), when=_is_pool)
def pool_padding(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    dirty, mask = padded(x, [n - n // 2, n])
    wanted = case.outputs(module, x[:1, : n - n // 2]).output
    expect_close(case.outputs(module, dirty, mask=mask).output[:1], wanted, "padding changes the pool")


def _pads_planes(case: Case) -> bool:
    return case.pattern in (Pattern.GRID, Pattern.VOLUME)


@prop(
    "grid-padding",
    "a grid whose last rows are padded gives what the smaller one gives",
    sizes=(2, 3, 5, 9),
    when=_pads_planes,
)
def grid_padding(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    for axis in range(1, x.ndim - 1):
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        mask.select(axis, -1)[:] = False
        small = x.narrow(axis, 0, x.shape[axis] - 1)
        wanted = case.outputs(module, small).output
        for fill in (50.0, -3.0):
            given = torch.where(mask[..., None], x, torch.full_like(x, fill))
            output = case.outputs(module, given, mask=mask).output
            real = output[tuple(slice(0, size) for size in wanted.shape)]
            expect_close(real, wanted, f"a masked end of axis {axis} (of {fill}) differs from a grid without it")


@prop("one-cell", "a map of one cell gives what a padded map around it gives", sizes=(1,), when=_pads_planes)
def one_cell(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(2)
    cell = x
    for axis in range(1, x.ndim - 1):
        cell = cell.narrow(axis, 0, 1)
    mask = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    mask.view(len(x), -1)[:, 0] = True
    wanted = case.outputs(module, cell).output
    expect(bool(wanted.isfinite().all()), "the result for one cell is not finite")
    output = case.outputs(module, x, mask=mask).output
    real = output[tuple(slice(0, size) for size in wanted.shape)]
    expect_close(real, wanted, "one cell in a padded map differs from it alone")


@prop(
    "map-padding",
    "what stands in padded cells of maps changes nothing",
    sizes=(3, 6),
    when=lambda c: c.pattern is Pattern.MAPS,
)
def map_padding(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    mask = everything(x)
    mask[:, ::3] = False
    first, second = (
        case.outputs(module, torch.where(mask[..., None], x, fill * torch.ones_like(x)), mask=mask).output
        for fill in (50.0, -3.0)
    )
    expect_close(first, second, "what stands in padded cells changes the result")
    expect(bool((case.usual(n) - first).abs().max() > 1e-9), "padding a third of all cells changes nothing")


@prop("left-padding", "left padding with positions equals no padding", when=lambda c: c.pattern is Pattern.CAUSAL_SELF)
def left_padding(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n, 1)
    for pad in (1, 3):
        dirty, mask, positions = _left_padded(x, pad)
        output = case.outputs(module, dirty, mask=mask, positions=positions).output[:, pad:]
        expect_close(output, case.usual(n, 1), f"{pad} padded tokens before {n} real ones change them")


def _left_padded(x: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    dirty = torch.cat([torch.full_like(x[:, :1], 1e3).expand(-1, pad, -1), x], 1)
    mask = torch.arange(dirty.shape[1], device=x.device)[None].expand(x.shape[0], -1) >= pad
    return dirty, mask, (mask.cumsum(1) - 1).clamp(min=0)


@prop("all-true-mask", "a mask that allows everything changes nothing", sizes=(1, 5, 17))
def all_true_mask(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    mask = each(context, everything) if case.pattern.cross else everything(x)
    expect_close(
        case.outputs(module, x, context, mask=mask).output, case.usual(n), "an all-True mask changes the output"
    )


@prop("all-padding", "a row with nothing to attend to gives no weight, no NaN, no NaN gradient", sizes=(1, 5, 17))
def all_padding(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n).requires_grad_(), case.context(n)

    def only_second(tensor: Tensor) -> Tensor:
        mask = everything(tensor)
        mask[0] = False
        return mask

    mask = each(context, only_second) if case.pattern.cross else only_second(x)
    result = module(x, context, mask=mask)
    total = result.output.sum() + sum(result.losses.values())
    grads = torch.autograd.grad(total, [x, *module.parameters()], allow_unused=True)
    expect(bool(result.output.isfinite().all()), "the output of an all-padding row is not finite")
    expect(all(bool(loss.isfinite()) for loss in result.losses.values()), "a loss is not finite")
    expect(all(bool(g.isfinite().all()) for g in grads if g is not None), "a gradient is not finite")
    weights = case.outputs(module, x.detach(), context, mask=mask, need_weights=True).weights
    if weights is not None:
        expect(bool((weights[0] == 0).all()), "an all-padding row has weights that are not zero")


def _has_one_source(case: Case) -> bool:
    """Several sources take a tuple of key paddings, and no dense mask."""
    return is_sequence(case) and case.shared().sources == 1


@prop("dense-mask", "a dense mask is obeyed, also per head, or refused", sizes=(2, 5, 17), when=_has_one_source)
def dense_mask(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    m = n if context is None else context.shape[1]
    generator = torch.Generator().manual_seed(n)
    for heads in (1, case.settings["heads"]):
        mask = (torch.rand(2, heads, n, m, generator=generator) < 0.5).to(x.device)
        mask[:, :, range(n), range(n)] = True
        try:
            result = case.outputs(module, x, context, mask=mask, need_weights=True)
        except ValueError as error:
            expect("mask" in str(error), f"a dense mask is refused without a word on masks: {error}")
            return
        fast = case.outputs(module, x, context, mask=mask).output
        expect_close(fast, result.output, f"dense mask {list(mask.shape)}: with and without need_weights differ")
        if result.weights is not None:
            forbidden = result.weights.masked_select(~mask.expand_as(result.weights))
            expect(bool((forbidden.abs() <= 1e-12).all()), "a key forbidden by the dense mask has weight")
        expect(
            bool((case.usual(n) - fast).abs().max() > 1e-9), "a dense mask that forbids half the keys changes nothing"
        )
