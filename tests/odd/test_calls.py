"""Odd calls of every mechanism: refused by name, or right; and a call that was refused leaves the state as it was."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from calls import good, refused
from scale import SEED, TIMES

from manyheads import Mechanism, State, list_attentions, mechanism_class
from manyheads.card import Pattern
from manyheads.testing.case import Case, each

FEW = 12  # odd calls of a mechanism under each pattern


def cases(name: str) -> list[Case]:
    cls = mechanism_class(name)
    return [Case(cls, pattern) for pattern in sorted(cls.card.patterns)]


def drawn(choices: dict[str, Any], rng: random.Random, count: int) -> list[tuple[str, Any]]:
    return rng.sample(sorted(choices.items()), min(count, len(choices)))


def call_of(case: Case, n: int = 5) -> dict[str, Any]:
    given = {"x": case.x(n, dtype=torch.float32), "context": case.context(n, dtype=torch.float32)}
    return {**given, "mask": None, "positions": None, "state": None}


def fault(module: Mechanism, call: dict[str, Any]) -> str | None:
    """What is wrong with how an odd call ends: refused by name is right, and so is a result of the call's own form."""
    try:
        with torch.no_grad():
            output = module(**call).output
    except ValueError as error:
        return None if module.card.name in str(error) else f"refused in other words: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    x = call["x"]
    shape = x.shape[:1] if module.card.patterns == {Pattern.POOL} else x.shape[:-1]
    right = (
        output.shape == (*shape, module.result_dim or module.dim)
        and output.device == x.device
        and output.is_floating_point()
    )
    return None if right else f"{tuple(output.shape)} {output.dtype} on {output.device} comes out"


@pytest.mark.parametrize("name", list_attentions())
def test_odd_calls_are_refused_by_name_or_right(name: str) -> None:
    rng, wrong = random.Random(f"{SEED} {name}"), []
    for _ in range(TIMES):
        for case in cases(name):
            module, call = case.build(torch.float32), call_of(case, rng.choice([1, 2, 5, 9]))
            for what, change in drawn(refused(case, module, call, rng), rng, FEW):
                if why := fault(module, change(call)):
                    wrong.append(f"{case.pattern.value}, {what}: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", list_attentions())
def test_calls_that_only_look_odd_are_the_same(name: str) -> None:
    for case in cases(name):
        module, call = case.build(torch.float32), call_of(case)
        with torch.no_grad():
            wanted = module(**call).output
            for what, change in good(case, call).items():
                torch.testing.assert_close(module(**change(call)).output, wanted, msg=lambda m, w=what: f"{w}: {m}")


DECODING = [
    (name, pattern)
    for name in list_attentions()
    for pattern in sorted(mechanism_class(name).card.patterns)
    if pattern.causal and mechanism_class(name).card.decodes
]


@pytest.mark.parametrize(("name", "pattern"), DECODING)
def test_a_refused_call_leaves_the_state_alone(name: str, pattern: Pattern) -> None:
    """A dozen tokens in passes of one to three, with odd calls of the same state between: as if they had not been."""
    rng = random.Random(f"{SEED} {name} {pattern}")
    case = Case(mechanism_class(name), pattern)
    module = case.build()
    for _ in range(TIMES):
        x, context = case.x(12), case.context(12)
        wanted, state = module.init_state(2), module.init_state(2)
        start = 0
        while start < 12:
            stop = min(12, start + rng.choice([1, 2, 3]))
            call = {"x": x[:, start:stop], "context": context, "mask": None, "positions": None}
            for what, change in drawn(odd_with_state(case, module, call, rng, state), rng, 4):
                _refused(module, state, what, change(call))
            for what, change in drawn(odd_methods(state), rng, 3):
                _method(state, what, change)
            right = case.outputs(module, state=wanted, **call).output
            torch.testing.assert_close(case.outputs(module, state=state, **call).output, right)
            start = stop


def odd_with_state(
    case: Case, module: Mechanism, call: dict[str, Any], rng: random.Random, state: State
) -> dict[str, Any]:
    found = {k: v for k, v in refused(case, module, {**call, "state": None}, rng).items() if k != "state: a thing"}
    n, seen = call["x"].shape[1], state.length
    hidden = torch.rand(2, seen + n, generator=torch.Generator().manual_seed(rng.randrange(2**31))) > 0.5
    own = {
        "weights of a pass with a state": lambda c: {**c, "need_weights": True},
        "context of another width": lambda c: {**c, "context": each(c["context"], lambda t: t[..., :-1])},
        "x of one row": lambda c: {**c, "x": c["x"][:1], "context": each(c["context"], lambda t: t[:1])},
    }
    if case.pattern is Pattern.CAUSAL_SELF:
        # Tokens that were real are hidden: another conversation, which is followed or refused.
        own["what has been seen is hidden"] = lambda c: {**c, "mask": hidden}
        own["what has been seen is hidden, odd x"] = lambda c: {**c, "mask": hidden, "x": c["x"].half()}
    return {**found, **own}


def _refused(module: Mechanism, state: State, what: str, call: dict[str, Any]) -> None:
    """Where the odd call is taken all the same, it has gone on a copy."""
    before, tried = copy.deepcopy(state), copy.deepcopy(state)
    try:
        with torch.no_grad():
            module(**call, state=tried)
    except ValueError:
        pass
    else:
        return
    with pytest.raises(ValueError, match=module.card.name):
        module(**call, state=state)
    assert (state.length, state.batch) == (before.length, before.batch), what
    assert state.nbytes <= 2 * before.nbytes + 4096, what


def odd_methods(state: State) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"truncate({value!r})": lambda s, v=value: s.truncate(v)
        for value in (-1, state.length + 1, 2.0, True, "1", None, float("nan"), 10**30)
    }
    indices = {
        "a list": [0, 1], "numbers": torch.tensor([0.0, 1.0]), "too large": torch.tensor([0, 2]),
        "an axis more": torch.tensor([[0, 1]]),
        "below": torch.tensor([-1, 0]), "booleans": torch.tensor([True, False]), "one": torch.tensor(0), "None": None,
        "none": torch.tensor([], dtype=torch.long), "on meta": torch.tensor([0, 1], device="meta"),
    }  # fmt: skip
    return found | {f"reorder, {what}": lambda s, i=index: s.reorder(i) for what, index in indices.items()}


def _method(state: State, what: str, call: Any) -> None:
    before = vars(copy.deepcopy(state))
    with pytest.raises(ValueError, match=state.owner):
        call(state)
    assert (state.length, state.batch) == (before["length"], before["batch"]), what


def test_a_byte_of_positions_does_not_wrap_round() -> None:
    case = Case(mechanism_class("shaw"), Pattern.CAUSAL_SELF)
    module, x = case.build(), case.x(9)
    far = torch.arange(200, 209)
    wanted = case.outputs(module, x, positions=far).output
    torch.testing.assert_close(case.outputs(module, x, positions=far.byte()).output, wanted)
