"""States and results as they are used inside code of others: copied, half trained, begun in another mode or dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads import Mechanism, State, create_attention

# Rows over time, rows within a window, a running summary, and a context read once.
KINDS: dict[str, dict[str, Any]] = {"softmax": {}, "mswa": {"window": 4}, "based": {}, "gated-cross": {}, "aaren": {}}


def built(name: str) -> tuple[Mechanism, Callable[..., Tensor], Tensor]:
    """In float64, with a call that fills in the context, and nine tokens."""
    torch.manual_seed(0)
    module = create_attention(name, 16, 4, causal=True, **KINDS[name]).double().eval()
    context = torch.randn(2, 6, 16).double() if name == "gated-cross" else None
    return module, lambda x, state=None: module(x, context, state=state).output, torch.randn(2, 9, 16).double()


COPIES: dict[str, Callable[[State], State]] = {"copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", KINDS)
def test_each_branch_of_a_copied_state_goes_its_own_way(name: str, how: str, graph: bool) -> None:
    module, call, x = built(name)
    other = torch.cat([x[:, :5], torch.randn(2, 4, 16).double()], 1)
    with torch.set_grad_enabled(graph):
        state = module.init_state(2, capacity=20)
        call(x[:, :5], state)
        branch = COPIES[how](state)
        parts: dict[int, list[Tensor]] = {0: [], 1: []}
        for t in range(5, 9):  # in turns, so that each would write over the other's rows
            parts[0].append(call(x[:, t : t + 1], state))
            parts[1].append(call(other[:, t : t + 1], branch))
        assert_close(torch.cat(parts[0], 1), call(x)[:, 5:])
        assert_close(torch.cat(parts[1], 1), call(other)[:, 5:])


def test_gradients_pass_through_a_copied_state() -> None:
    module, call, x = built("softmax")
    x.requires_grad_()
    state = module.init_state(2)
    call(x[:, :5], state)
    (found,) = torch.autograd.grad(call(x[:, 5:], copy.deepcopy(state)).square().sum(), x)
    (wanted,) = torch.autograd.grad(call(x)[:, 5:].square().sum(), x)
    assert_close(found, wanted)


MODES: list[Callable[[], AbstractContextManager[Any]]] = [torch.inference_mode, torch.no_grad, torch.enable_grad]


@pytest.mark.parametrize("then", MODES)
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_a_state_begun_in_one_mode_goes_on_in_another(name: str, first: Any, then: Any) -> None:
    module, call, x = built(name)
    state = module.init_state(2)
    with first():
        parts = [call(x[:, :5], state)]
    with then():
        parts += [call(x[:, t : t + 1], state) for t in range(5, 9)]
    assert_close(torch.cat([part.detach() for part in parts], 1), call(x).detach())


@pytest.mark.parametrize("learnt", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("name", ["softmax", "mswa"])
def test_gradients_through_a_state_where_one_projection_learns(name: str, learnt: str) -> None:
    """As with an adapter on the queries: rows that have no gradient of their own are read again for that of others."""
    module, call, x = built(name)
    module.requires_grad_(False)
    weight = module.get_submodule(learnt).weight
    assert isinstance(weight, Tensor)
    weight.requires_grad_(True)
    state = module.init_state(2, capacity=20)
    with torch.no_grad():
        call(x[:, :2], state)
    parts = [call(x[:, start:stop], state) for start, stop in ((2, 5), (5, 6), (6, 7), (7, 9))]
    (found,) = torch.autograd.grad(torch.cat(parts, 1).square().sum(), weight)
    state = module.init_state(2)
    with torch.no_grad():
        call(x[:, :2], state)
    (wanted,) = torch.autograd.grad(call(x[:, 2:], state).square().sum(), weight)
    assert_close(found, wanted)


@pytest.mark.parametrize("capacity", [0, 20])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rows_follow_the_dtype_of_the_pass_whether_there_was_room_or_not(capacity: int, kinds: Any) -> None:
    module, _, x = built("softmax")
    wanted = module(x).output[:, 5:].detach()
    state = module.init_state(2, capacity=capacity)
    with torch.no_grad():
        module.to(kinds[0])(x[:, :5].to(kinds[0]), state=state)
        output = module.to(kinds[1])(x[:, 5:].to(kinds[1]), state=state).output
    assert output.dtype == kinds[1]
    assert_close(output.double(), wanted, rtol=0.1, atol=0.05)


def test_a_state_of_another_dtype_that_cannot_follow_is_named() -> None:
    module, call, x = built("gated-cross")
    state = module.init_state(2)
    with torch.no_grad():
        call(x, state)
        module.float()
        with pytest.raises(ValueError, match=r"gated-cross: .*float32.*the state holds torch.float64.*a new state"):
            module(x.float(), torch.randn(2, 6, 16), state=state)


def test_what_a_caller_adds_to_the_losses_of_one_result_is_in_no_other() -> None:
    module, _, x = built("aaren")
    module(x).losses["mine"] = torch.ones(())  # type: ignore[index]
    assert not module(x).losses


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("a hook's own")])
def test_an_error_that_is_not_the_calls_stays_what_it_is(error: RuntimeError) -> None:
    """Who halves the batch when memory runs out listens for that error; under autocast dtypes differ rightly."""
    module = create_attention("softmax", 16, 4)

    def breaks(*_: Any) -> None:
        raise error

    module.get_submodule("o_proj").register_forward_hook(breaks)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(type(error), match=str(error)) as found:
        module(torch.randn(1, 3, 16, dtype=torch.bfloat16))
    assert found.value is error
