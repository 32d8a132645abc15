"""A mask over earlier passes, at the contract: weights, dense masks, copies and bytes stay right."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads import create_attention

X = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 9, dtype=torch.bool)
MASK[1, 2:4] = False


def module(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return create_attention(name, 16, 4, causal=True, **options).double().eval()


def fed(layer: Any, n: int = 6) -> Any:
    state = layer.init_state(2)
    with torch.no_grad():
        layer(X[:, :n], state=state)
    return state


@torch.no_grad()
def test_weights_stand_where_their_tokens_do() -> None:
    layer = module("softmax")
    state = fed(layer)
    dense = MASK[:, None, None].expand(2, 1, 9, 9)
    wanted = layer(X, mask=dense, need_weights=True)
    found = layer(X[:, 6:8], mask=MASK[:, :8], state=state, need_weights=True)
    assert state.places is not None
    assert_close(found.weights, wanted.weights[:, :, 6:8, :8])
    assert_close(found.output, wanted.output[:, 6:8])
    # A dense mask names tokens by their order, whatever the state's is.
    own = torch.rand(2, 4, 1, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    found = layer(X[:, 8:], mask=own & MASK[:, None, None], state=state, need_weights=True)
    full = torch.cat([torch.ones(2, 4, 8, 9, dtype=torch.bool), own & MASK[:, None, None]], 2)
    wanted = layer(X, mask=full, need_weights=True)
    assert_close(found.weights, wanted.weights[:, :, 8:])
    assert_close(found.output, wanted.output[:, 8:])


@torch.no_grad()
def test_weights_behind_a_window() -> None:
    layer = module("mswa", window=4)
    assert 5 < max(layer.windows) < 9
    state = layer.init_state(2)
    layer(X[:, :4], state=state)
    mask = MASK[:, :5].clone()
    layer(X[:, 4:5], mask=mask, state=state)
    alone = torch.cat([X[1:, :2], X[1:, 4:]], 1)
    for t in range(5, 9):
        found = layer(X[:, t : t + 1], state=state, need_weights=True)
        wanted = layer(alone, need_weights=True)
        assert_close(found.output[1:], wanted.output[:, t - 2 : t - 1])
        columns = found.weights.shape[-1]
        spread = torch.zeros(1, 4, 1, 9, dtype=torch.float64)
        spread[..., t + 1 - columns : t + 1] = found.weights[1:]
        assert_close(spread[..., [0, 1, 4, 5, 6, 7, 8]], wanted.weights[:, :, t - 2 : t - 1])


@torch.no_grad()
def test_truncated_and_reordered_after_a_mask() -> None:
    layer = module("moba", block=2, top_k=2)
    state = fed(layer)
    layer(X[:, 6:8], mask=MASK[:, :8], state=state)
    state.truncate(7)
    state.reorder(torch.tensor([1, 1, 0]))
    rows, positions = X[[1, 1, 0]], torch.arange(9)[None].expand(3, -1)
    found = layer(rows[:, 7:], mask=MASK[[1, 1, 0]], state=state, positions=positions[:, 7:]).output
    kept = [0, 1, 4, 5, 6, 7, 8]
    alone = layer(X[1:, kept], positions=positions[:1, kept]).output[:, -2:]
    assert_close(found[:2], alone.expand(2, -1, -1))
    assert_close(found[2:], layer(X[:1]).output[:, 7:])


@torch.no_grad()
def test_a_copy_is_left_alone() -> None:
    layer = module("softmax")
    state = fed(layer)
    kept = copy.deepcopy(state)
    layer(X[:, 6:], mask=MASK, state=state)
    assert_close(layer(X[:, 6:], state=kept).output, layer(X).output[:, 6:])


@torch.no_grad()
def test_a_recurrence_refuses_other_tokens_and_takes_the_same() -> None:
    layer = module("aaren")
    state = layer.init_state(2)
    layer(X[:, :6], mask=MASK[:, :6], state=state)
    for wrong in (torch.ones_like(MASK), MASK.roll(1, 1), MASK.flip(0)):
        with pytest.raises(ValueError, match=r"aaren: the mask .* running summary .* new cache.* padding on the left"):
            layer(X[:, 6:], mask=wrong, state=state)
    found = layer(X[:, 6:], mask=MASK, state=state).output
    assert_close(found[1:], layer(X[1:, [0, 1, 4, 5, 6, 7, 8]]).output[:, 4:])
    state.reorder(torch.tensor([1]))
    assert state.nbytes == sum(t.nbytes for t in (*state.fixed.values(), torch.zeros(1, dtype=torch.int64)))


def test_shapes_are_named() -> None:
    layer = module("softmax")
    with pytest.raises(ValueError, match=r"want \[2, 3\] or \[2, 9\] or"):
        layer(X[:, 6:], mask=MASK[:, :8], state=fed(layer))


def test_gradients_reach_what_was_moved() -> None:
    layer, x = module("softmax"), X.clone().requires_grad_()

    def passes(rows: Tensor) -> Tensor:
        state = layer.init_state(2)
        layer(rows[:, :6], state=state)
        return layer(rows[:, 6:], mask=MASK, state=state).output

    dense = MASK[:, None, None].expand(2, 1, 9, 9)
    found, wanted = passes(x), layer(x, mask=dense).output[:, 6:]
    assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (found, wanted)))


@torch.no_grad()
def test_truncated_states_stay_in_order_for_masks_of_the_pass_alone() -> None:
    layer = module("moba", block=2, top_k=1)
    state = fed(layer)
    layer(X[:, 6:8], mask=MASK[:, :8], state=state)
    state.truncate(7)
    positions, kept = torch.arange(9).expand(2, -1), [0, 1, 4, 5, 6, 7, 8]
    for t in (7, 8):
        found = layer(X[:, t : t + 1], state=state, positions=positions[:, t : t + 1]).output
        wanted = layer(X[1:, kept], positions=positions[1:, kept]).output
        assert_close(found[1:], wanted[:, t - 2 : t - 1])
    assert state.places is not None  # hidden tokens are still in front


@torch.no_grad()
def test_a_window_that_slid_over_hidden_tokens_does_not_show_them_again() -> None:
    layer = module("mswa", window=4)
    held = max(layer.windows) - 1
    state = layer.init_state(2)
    layer(X[:, :4], state=state)
    layer(X[:, 4:5], mask=MASK[:, :5], state=state)
    for t in range(5, 9):
        layer(X[:, t : t + 1], state=state)
    assert len(state.grown["keys"]) == held
    with pytest.raises(ValueError, match=r"mswa.*behind its window"):
        layer(X[:, :1], mask=torch.ones(2, 10, dtype=torch.bool), state=state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types(dtype: torch.dtype) -> None:
    layer, x = module("softmax").to(dtype), X.to(dtype)
    state = layer.init_state(2)
    layer(x[:, :6], state=state)
    found = layer(x[:, 6:], mask=MASK, state=state).output
    assert found.dtype == dtype
    wanted = module("softmax")(X, mask=MASK[:, None, None].expand(2, 1, 9, 9)).output[:, 6:]
    assert_close(found.double(), wanted, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype):
        layer, state = module("softmax").float(), module("softmax").init_state(2)
        layer(X[:, :6].float(), state=state)
        found = layer(X[:, 6:].float(), mask=MASK, state=state).output
    assert_close(found.double(), wanted, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_first_turn_of_one_token() -> None:
    layer, mask = module("softmax"), torch.tensor([[True, True], [False, True]])
    state = fed(layer, 1)
    found = layer(X[:, 1:2], mask=mask, positions=torch.tensor([[1], [0]]), state=state).output
    assert_close(found[1:], layer(X[1:, 1:2]).output)
