"""What a card says a state takes must be what is held, in bytes of storages, after n and after 2 n decoded tokens.

The claim is the card's `state`: a formula in n (the tokens decoded), w (the constructor's `window`), k (its `top_k`)
and whatever else the constructor takes by that name. It counts rows, a row being a key and a value of all heads, 2 dim
numbers; where it names widths (mla's ranks and dims), it counts numbers. Beside its rows a state may keep labels of 8
bytes (the group of a row; per head the place and the score of one that was chosen), and buffers may have room for rows
to come: half of what they hold where that grows, as much again within a bound. A long first pass may leave no more
behind than decoding does.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from manyheads import list_attentions, mechanism_class
from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.state import State
from manyheads.testing.case import Case
from manyheads.testing.properties.decoding import _tensor_bytes as stored

N, DIM, HEADS, WIDER = 120, 16, 4, 9
CAUSAL = {Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS}
CLAIMING = [
    name
    for name in list_attentions()
    if mechanism_class(name).card.decodes
    and mechanism_class(name).card.patterns & CAUSAL
    and mechanism_class(name).card.state != "n"
]
GROWING = [name for name in CLAIMING if re.search(r"\bn\b", mechanism_class(name).card.state)]
BOUNDED = [name for name in CLAIMING if re.search(r"\b[wk]\b", mechanism_class(name).card.state)]
CONSTANT = [name for name in CLAIMING if mechanism_class(name).card.state == "1"]


def of(name: str) -> Case:
    """With windows and choices so wide that no constant is taken for them."""
    cls = mechanism_class(name)
    wider = {key: WIDER * cls.card.example[key] for key in ("window", "top_k") if key in cls.card.example}
    pattern = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in cls.card.patterns else Pattern.CAUSAL_CROSS
    return Case(cls, pattern, wider if name in (*GROWING, *BOUNDED) else {})


def decoded(case: Case, module: Mechanism, *chunks: int) -> State:
    state, start, x = module.init_state(1), 0, case.x(sum(chunks), 1, dtype=torch.float32)
    for size in chunks:
        case.outputs(module, x[:, start : start + size], case.context(8, 1, dtype=torch.float32), state=state)
        start += size
    return state


def rows(state: State) -> int:
    """Bytes of the rows in use, without the room beside them."""
    grown = [buffer.view() for buffer in state.grown.values() if buffer.data is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*grown, *state.fixed.values()])


def claimed(module: Mechanism, n: int) -> float:
    """Bytes that the card's formula says."""
    formula = module.card.state
    names: dict[str, Any] = {"n": n, "heads": module.heads, **module.config}
    names |= {"w": module.config.get("window"), "k": module.config.get("top_k")}
    # Side by side means times.
    product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", formula)
    value = float(eval(product, {"__builtins__": {}}, names))
    return 4 * value * (1 if re.search(r"_(dim|rank)\b", formula) else 2 * module.dim)


def test_every_claim_is_read() -> None:
    assert {*GROWING, *BOUNDED, *CONSTANT} == set(CLAIMING)
    assert len(GROWING) >= 9
    assert len(BOUNDED) >= 5
    assert len(CONSTANT) >= 20
    mla = of("mla").build(torch.float32)
    assert claimed(mla, 10) == 4 * 10 * (10 + 4)
    assert claimed(of("gqa").build(torch.float32), 10) == 4 * 10 * 2 * DIM / 2


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_state_grows_as_claimed(name: str) -> None:
    case = of(name)
    module = case.build(torch.float32)
    found = [decoded(case, module, *[1] * tokens) for tokens in (N, 2 * N)]
    grown, wanted = rows(found[1]) - rows(found[0]), claimed(module, 2 * N) - claimed(module, N)
    assert wanted <= grown <= wanted + 8 * wanted / (8 * DIM)
    for state, tokens in zip(found, (N, 2 * N), strict=True):
        assert state.nbytes == stored(state) <= 1.6 * claimed(module, tokens)
    passed = decoded(case, module, 2 * N - 8, *[1] * 8)
    assert stored(passed) <= 1.6 * claimed(module, 2 * N)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bounded_state_stays_within_its_bound(name: str) -> None:
    case = of(name)
    module = case.build(torch.float32)
    count = claimed(module, N) / (8 * module.dim)
    assert count < N, "want more tokens than the bound"
    one, two = (decoded(case, module, *[1] * tokens) for tokens in (N, 2 * N))
    assert one.nbytes == stored(one) == stored(two)
    assert rows(two) <= claimed(module, N) + 2 * 8 * HEADS * count + 64 * DIM
    passed = decoded(case, module, 2 * N - 1, 1)
    assert max(stored(two), stored(passed)) <= 2 * claimed(module, N) + 2 * 8 * HEADS * count


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_state_is_constant(name: str) -> None:
    case = of(name)
    module = case.build(torch.float32)
    one, two = (decoded(case, module, *[1] * tokens) for tokens in (24, 48))
    assert one.nbytes == stored(one) == stored(two)
    assert stored(decoded(case, module, 47, 1)) <= stored(two)
