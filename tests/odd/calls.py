"""Odd calls of a mechanism: arguments that no call can take, and those that look odd and are good."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, each
from manyheads.testing.properties.prop import is_plane

Arguments = dict[str, Any]
# What the arguments of a good call become.
Change = Callable[[Arguments], Arguments]
THINGS: list[Any] = [7, 1.5, "x", [], [1.0], {}, (), object(), b"x", True, range(3)]


def _put(name: str, make: Callable[[Tensor], Any]) -> Change:
    return lambda call: {**call, name: make(call["x"])}


def _x(change: Callable[[Tensor], Any]) -> Change:
    return lambda call: {**call, "x": change(call["x"])}


def _context(change: Callable[[Tensor], Any]) -> Change:
    return lambda call: {**call, "context": each(call["context"], change)}


def _things(name: str, rng: random.Random, *none: Any) -> Change:
    thing = rng.choice([*THINGS, *none])
    return lambda call: {**call, name: thing}


def _shapes(tensor: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    return {
        "no tokens": lambda t: t[:, :0], "no rows": lambda t: t[:0], "wider": lambda t: torch.cat([t, t], -1),
        "narrower": lambda t: t[..., :-1], "one number": lambda t: t.sum(), "a vector": lambda t: t.flatten(),
        "an axis more": lambda t: t[None, None], "no features": lambda t: t[..., :0], "integers": lambda t: t.long(),
        "booleans": lambda t: t > 0, "complex": lambda t: t.to(torch.complex64), "a list": lambda t: t.tolist(),
        "an array": lambda t: t.numpy(), "sparse": lambda t: t.to_sparse(), "on meta": lambda t: t.to("meta"),
        "half": lambda t: t.half(), "bfloat16": lambda t: t.bfloat16(), "quarter": lambda t: t.to(torch.float8_e4m3fn),
    }  # fmt: skip


def refused(case: Case, module: Mechanism, call: Arguments, rng: random.Random) -> dict[str, Change]:
    """By what they are. Each must be a ValueError that names the mechanism, or be right."""
    x, context = call["x"], call["context"]
    n, batch = x.shape[1], x.shape[0]
    flat = not is_plane(case)
    found: dict[str, Change] = {f"x: {what}": _x(change) for what, change in _shapes(x).items()}
    found |= {f"x: {None}": _x(lambda t: None), "x: a thing": _things("x", rng, None)}
    if context is None:
        found |= {"context: not expected": _put("context", lambda t: t), "context: a thing": _things("context", rng)}
    else:
        found |= {f"context: {what}": _context(change) for what, change in _shapes(x).items()}
        found |= {
            "context: none": lambda c: {**c, "context": None}, "context: a thing": _things("context", rng, None),
            "context: another batch": _context(lambda t: torch.cat([t, t])),
            "context: one more": lambda c: {**c, "context": (*_parts(c["context"]), x)},
        }  # fmt: skip
    size = (batch, n) if flat else tuple(x.shape[:3])
    found |= {
        "mask: a thing": _things("mask", rng), "mask: of numbers": _put("mask", lambda t: torch.ones(size)),
        "mask: of integers": _put("mask", lambda t: torch.ones(size, dtype=torch.long)),
        "mask: longer": _put("mask", lambda t: torch.ones(batch, 7 * n + 1, dtype=torch.bool)),
        "mask: of another batch": _put("mask", lambda t: torch.ones(batch + 1, *size[1:], dtype=torch.bool)),
        "mask: of no rows": _put("mask", lambda t: torch.ones(0, *size[1:], dtype=torch.bool)),
        "mask: one number": _put("mask", lambda t: torch.tensor(True)),
        "mask: flat": _put("mask", lambda t: torch.ones(n, dtype=torch.bool)),
        "mask: of more heads": _put("mask", lambda t: torch.ones(batch, 97, n, n, dtype=torch.bool)),
        "mask: of three axes": _put("mask", lambda t: torch.ones(batch, n, 7 * n + 1, dtype=torch.bool)),
        "mask: on meta": _put("mask", lambda t: torch.ones(size, dtype=torch.bool, device="meta")),
        "positions: a thing": _things("positions", rng),
        "positions: of numbers": _put("positions", lambda t: torch.ones(n)),
        "positions: too many": _put("positions", lambda t: torch.arange(n + 1)),
        "positions: of three axes": _put("positions", lambda t: torch.arange(n).expand(1, batch, n)),
        "positions: of another batch": _put("positions", lambda t: torch.arange(n).expand(batch + 1, n)),
        "positions: one": _put("positions", lambda t: torch.tensor(1)),
        "positions: on meta": _put("positions", lambda t: torch.arange(n, device="meta")),
        "state: a thing": _things("state", rng),
    }  # fmt: skip
    return found


def _parts(context: Any) -> tuple[Any, ...]:
    return (context,) if isinstance(context, Tensor) else tuple(context)


def good(case: Case, call: Arguments) -> dict[str, Change]:
    """Odd to look at, and the same call: the result must be the same."""
    n = call["x"].shape[1]
    found: dict[str, Change] = {
        "x: strides of its own": _x(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)),
        "x: a subclass": _x(lambda t: torch.nn.Parameter(t)),
        "x: every second": _x(lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    }
    if not is_plane(case) and call.get("state") is None:
        positions = _put("positions", lambda t: torch.arange(n, dtype=torch.int32))
        found |= {
            "positions: int32": positions,
            "positions: uint8": _put("positions", lambda t: torch.arange(n).byte()),
        }
    return found
