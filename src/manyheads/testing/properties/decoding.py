"""States: decoding, reordering, truncating, and what they weigh."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from manyheads.mechanism import Mechanism
from manyheads.state import State
from manyheads.testing.case import Case, each, expect, expect_close
from manyheads.testing.properties.prop import (
    SIZES,
    decodes,
    must_raise,
    prop,
)

# Tokens one by one behind a longer pass: more than the windows of the examples hold.
FEW = 5


def _decode(
    case: Case, module: Mechanism, x: Tensor, context: Any, chunks: list[int], **call: Any
) -> tuple[Tensor, State]:
    state, parts, start = module.init_state(x.shape[0]), [], 0
    for size in chunks:
        now = {name: value[:, start : start + size] for name, value in call.items()}
        parts.append(case.outputs(module, x[:, start : start + size], context, state=state, **now).output)
        start += size
    return torch.cat(parts, 1), state


@prop("decode", "token by token and in chunks equals the parallel pass", when=decodes)
def decode(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    wanted, few = case.usual(n), min(n // 3, FEW)
    ways = ([1] * n, [n - few, *[1] * few], [n // 2, 1, n - n // 2 - 1], [n])
    for sizes in sorted({tuple(size for size in way if size > 0) for way in ways}):  # of few tokens several are one
        output, state = _decode(case, module, x, context, list(sizes))
        expect_close(output, wanted, f"decoding in chunks of {list(sizes)} differs from one pass")
        expect(state.length == n, f"the state counts {state.length} tokens after {n}")


def _decodes_itself(case: Case) -> bool:
    return decodes(case) and not case.pattern.cross


@prop("decode-padded", "decoding a left-padded batch equals the parallel pass", when=_decodes_itself, sizes=SIZES[1:])
def decode_padded(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    mask = torch.arange(n, device=x.device)[None] >= torch.tensor([[n // 2], [0]], device=x.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = case.outputs(module, x, mask=mask, positions=positions).output
    rest = n - n // 2 - 1
    few = min(rest, FEW)
    for chunks in ([n // 2 + 1, *[rest - few] * (rest > few), *[1] * few], [1] * n):
        output, _ = _decode(case, module, x, None, chunks, mask=mask, positions=positions)
        gap = torch.where(mask[..., None], output - wanted, 0.0)
        expect_close(gap, torch.zeros_like(gap), f"left-padded, chunks {chunks}: differs from one pass")


@prop(
    "decode-weights",
    "weights of a decoded token are a row of the parallel ones, or refused",
    when=decodes,
    sizes=(2, 9),
)
def decode_weights(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    wanted = case.outputs(module, x, context, need_weights=True).weights
    state = module.init_state(2)
    case.outputs(module, x[:, :-1], context, state=state)
    try:
        result = case.outputs(module, x[:, -1:], context, state=state, need_weights=True)
    except ValueError as error:
        expect("state" in str(error), f"weights are refused without a word on the state: {error}")
        return
    expect((wanted is None) == (result.weights is None), "weights exist in one of decoding and the parallel pass only")
    if wanted is not None and result.weights is not None:
        row = wanted[:, :, -1:]
        # A window's state has dropped what the row gives no weight.
        held = result.weights.shape[-1]
        expect_close(result.weights, row[..., row.shape[-1] - held :], "the decoded row of weights differs")
        expect(bool((row[..., : row.shape[-1] - held] == 0).all()), "a dropped key has weight in the parallel pass")


@prop(
    "mask-earlier",
    "a mask over tokens of earlier passes gives what the row gives without them, or is refused",
    when=_decodes_itself,
    sizes=(3, 9, 33),
)
def mask_earlier(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    half, wanted = n - n // 2, case.usual(n)
    usual = torch.arange(n, device=x.device)
    for hidden in ({half - 1}, {0}, set(range(half // 3, 1 + half // 2))):
        for fed in (True, False):  # first seen, then hidden; and the other way round
            mask = torch.ones(2, n, dtype=torch.bool, device=x.device)
            mask[1, sorted(hidden)] = False
            now = mask if fed else torch.ones_like(mask)
            positions = torch.stack([usual, usual])
            positions[1, half:] -= half - 1 - int(usual[:half][now[1, :half]].max()) if half > len(hidden) else half
            state = module.init_state(2)
            case.outputs(module, x[:, :half], state=state, mask=None if fed else mask[:, :half])
            alone = case.outputs(module, x[1:, now[1]], positions=positions[1:, now[1]]).output[:, half - n :]
            if not _follows(case, module, x, state, now, positions, torch.cat([wanted[:1, half:], alone])):
                expect(state.length == half, "the refusal came after the state had counted on")


def _follows(
    case: Case, module: Mechanism, x: Tensor, state: State, mask: Tensor, positions: Tensor, wanted: Tensor
) -> bool:
    """Passes the rest in a chunk and tokens; False where it is refused."""
    seen, n = state.length, x.shape[1]
    alone = max(seen + (n - seen) // 2, n - FEW)
    for start, stop in ((seen, alone), *((t, t + 1) for t in range(alone, n))):
        if start == stop:
            continue
        call = {"mask": mask[:, :stop], "positions": positions[:, start:stop]}
        try:
            output = case.outputs(module, x[:, start:stop], state=state, **call).output
        except ValueError as error:
            spoken = case.cls.card.name in str(error) and "feed the conversation again" in str(error)
            expect(spoken and start == seen, f"a mask over earlier tokens is refused in other words: {error}")
            return False
        message = f"a mask that hides or shows tokens of an earlier pass, tokens {start} to {stop}: the row differs"
        expect_close(output, wanted[:, start - seen : stop - seen], message)
    return True


@prop("reorder", "after state.reorder each row continues the row it came from", when=decodes, sizes=(2, 5, 17))
def reorder(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n, 3), case.context(n, 3)
    for index in ([2, 0, 1], [1, 1, 0], [2], [0, 1, 2, 0, 2]):
        rows = torch.tensor(index, device=x.device)
        state, half = module.init_state(3), n - n // 2
        case.outputs(module, x[:, :half], context, state=state)
        state.reorder(rows)
        moved, context_moved = x[rows], each(context, lambda c, r=rows: c[r])  # type: ignore[misc]
        if half == n:
            continue
        output = case.outputs(module, moved[:, half:], context_moved, state=state).output
        wanted = case.outputs(module, moved, context_moved).output[:, half:]
        expect_close(output, wanted, f"after reorder({index}) the continuation differs: the state is stale")


@prop("truncate", "a truncated state continues as if the rest had not been seen, or says that it cannot", when=decodes)
def truncate(case: Case, n: int) -> None:
    if n < 2:
        return
    module, x, context = case.shared(), case.x(n), case.context(n)
    state, keep = module.init_state(2), n // 2
    case.outputs(module, x, context, state=state)
    try:
        state.truncate(keep)
    except ValueError:
        return
    expect(state.length == keep, f"truncate({keep}) leaves a state of {state.length}")
    other = torch.cat([x[:, :keep], case.x(n - keep, seed=77)], 1)
    output = case.outputs(module, other[:, keep:], context, state=state).output
    wanted = case.outputs(module, other, context).output[:, keep:]
    expect_close(output, wanted, f"after truncate({keep}) of {n} the continuation differs")


@prop("state-bytes", "state.nbytes is what its tensors take; a constant state stays constant", when=decodes, sizes=(9,))
def state_bytes(case: Case, n: int) -> None:
    module, context = case.shared(), case.context(n)
    sizes = []
    for length in (n, 8 * n):
        # One token at a time, as in use: a long first chunk may hold more for a moment.
        _, state = _decode(case, module, case.x(length), context, [1] * length)
        found = _tensor_bytes(state)
        expect(state.nbytes == found, f"state.nbytes is {state.nbytes}, its tensors take {found}")
        sizes.append(found)
    if not re.search(r"\bn\b", case.cls.card.state):
        grown = f"the card says a constant state, but it takes {sizes} bytes after {n} and {8 * n} tokens"
        expect(sizes[0] == sizes[1], grown)
        _, state = _decode(case, module, case.x(9 * n), context, [8 * n, *[1] * n])
        most = 2 * sizes[0]
        expect(
            state.nbytes <= most, f"after a pass of {8 * n} tokens the state keeps {state.nbytes} bytes, over {most}"
        )


def _tensor_bytes(root: object) -> int:
    """Bytes of every storage that can be reached from an object."""
    storages: dict[int, int] = {}
    stack, seen = [root], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(storages.values())


@prop("state-refuses", "a state of another mechanism, batch size or module is refused", when=decodes, sizes=(3,))
def state_refuses(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    must_raise("a state for another batch size", lambda: module(x, context, state=module.init_state(5)))
    must_raise("a state of another mechanism", lambda: module(x, context, state=State("another", 2)))
