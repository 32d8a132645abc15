"""What does not fit is refused by name before anything is sent."""

from typing import Any

import pytest
import torch

from manyheads.parallel import Layout, ring_attention, state_attention

X = torch.randn(1, 2, 6, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "window=3, causal=False"),
        ({"window": 0, "causal": True}, "window=0"),
        ({"padding": torch.ones(1, 5, dtype=torch.bool)}, r"padding of shape \(1, 5\)"),
        ({"padding": torch.ones(1, 6)}, "padding of torch.float32"),
        ({"documents": torch.full((1, 6), -1)}, "documents below zero"),
        ({"documents": torch.zeros(1, 6)}, "not whole"),
    ],
)
def test_ring_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ring_attention(X, X, X, Layout(6), **options)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.randn(1, 3, 6, 4), "g a divisor of h"),
        (torch.randn(1, 2, 5, 4), r"k \(1, 2, 5, 4\)"),
        (torch.randn(1, 2, 6, 3), r"k \(1, 2, 6, 3\)"),
        (X.double(), "torch.float64"),
    ],
)
def test_ring_shapes(k: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ring_attention(X, k, k, Layout(6))


def test_shards_of_another_length() -> None:
    with pytest.raises(ValueError, match="6 tokens were given to process 0 of 1; want its 7 of 7 in a zigzag layout"):
        ring_attention(X, X, X, Layout(7))
    with pytest.raises(ValueError, match="want length 7 in axis 2"):
        Layout(7).shard(X, 2)
    with pytest.raises(ValueError, match="length=0"):
        Layout(0)
    with pytest.raises(ValueError, match="kind='striped'"):
        Layout(4, "striped")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": Layout(6)}, "a zigzag layout"),
        ({"slopes": torch.ones(2)}, "causal=False"),
        ({"slopes": torch.ones(3), "causal": True}, r"slopes of shape \(3,\)"),
        ({"slopes": torch.ones(2, requires_grad=True), "causal": True}, "requires_grad=True"),
        ({"padding": torch.ones(1, 6)}, "want booleans"),
        ({"k": torch.randn(1, 1, 6, 4)}, "want one b, h, n"),
    ],
)
def test_state_options(options: dict[str, Any], message: str) -> None:
    given = {"layout": Layout(6, "contiguous"), "k": X} | options
    with pytest.raises(ValueError, match=message):
        state_attention(X, v=X, **given)
