"""Every argument of every mechanism with every odd value, and several at once: works, or is refused by name."""

import inspect
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scale import SEED, TIMES

from manyheads import Mechanism, list_attentions, mechanism_class
from manyheads.testing.case import Case

ODD: list[Any] = [
    None, 0, 1, -1, 2, 3, 7, 2.0, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, True, False, "", "x",
    [], [0], [1.5], ["x"], [math.nan], {}, {"base": "x"}, {"base": math.nan}, {"x": 1}, {1: 2}, object(), int, 1j, b"x",
]  # fmt: skip


def tries(cls: type[Mechanism]) -> list[tuple[str, Any]]:
    names = list(inspect.signature(cls).parameters)
    return [(name, value) for name in names for value in ODD]


def called(cls: type[Mechanism], odd: Mapping[str, Any]) -> str | None:
    """What is wrong with these arguments, None where they work or are refused well."""
    causal = any(p.causal for p in cls.card.patterns)
    settings = {"dim": 16, "heads": 4, **cls.card.example, "causal": causal, **odd}
    try:
        module = cls(**settings)
        json.dumps(module.config)
        pattern = next(p for p in sorted(cls.card.patterns) if p.causal == module.causal)
        case = Case(cls, pattern, {k: v for k, v in settings.items() if k != "causal"})
        x = nothing(case, module)
        context = case.context(5, 1, dtype=torch.float32) if pattern.cross else None
        output = module(x, context).output
    except ValueError as error:
        text = str(error)
        named = cls.card.name in text or any(name in text for name in odd)
        return None if named else f"refused in other words: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(output, tuple):  # several maps, each of features of its own
        return None
    return None if output.shape[-1] == (module.result_dim or module.dim) else "another width comes out"


def nothing(case: Case, module: Mechanism) -> Any:
    """Zeros in the form that the pattern wants."""
    sizes = {"grid": (5, 6), "grid-cross": (5, 6), "volume": (3, 4, 2)}.get(case.pattern, (5,))
    if case.pattern != "maps":
        return torch.zeros(1, *sizes, module.dim)
    widths = module.map_dims or (module.dim,)
    return tuple(torch.zeros(1, *size, wide) for size, wide in zip(module.map_sizes(5, 6), widths, strict=True))


@pytest.mark.parametrize("name", list_attentions())
def test_arguments_are_taken_or_refused_by_name(name: str) -> None:
    cls = mechanism_class(name)
    wrong = [f"{key}={value!r}: {why}" for key, value in tries(cls) if (why := called(cls, {key: value}))]
    assert not wrong, "\n".join(wrong)


# Values that most arguments take: what is built from two of them gets furthest.
NEAR: list[Any] = [None, 1, 2, 3, 5, 7, 8, 15, 17, 64, 0.5, 1.0, True, False, [1], [2, 3], {}]


@pytest.mark.parametrize("name", list_attentions())
def test_odd_arguments_together(name: str) -> None:
    cls, rng = mechanism_class(name), random.Random(f"{SEED} {name}")
    names, wrong = list(inspect.signature(cls).parameters), []
    for _ in range(15 * TIMES):
        chosen = rng.sample(names, min(len(names), rng.choice([2, 2, 3])))
        odd = {key: rng.choice(NEAR if rng.random() < 0.8 else ODD) for key in chosen}
        if why := called(cls, odd):
            wrong.append(f"{odd}: {why}")
    assert not wrong, "\n".join(wrong)
