"""Reading a layer's weight only where that is all there is to a call of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from manyheads.functional.layers import RMSNorm, call_in, plain_weight
from manyheads.functional.precision import own_dtype, unit


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Quantised(Tensor):
    """Stands for the weights that quantisers put into a plain Linear."""


def hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, given, output: 2 * output)
    return layer


def pre_hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return layer


def patched(layer: nn.Linear) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return layer


def quantised(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    return layer


@pytest.mark.parametrize(
    "change",
    [hooked, pre_hooked, patched, quantised, parametrizations.weight_norm, lambda layer: Doubled(4, 3), nn.Sequential],
)
def test_a_layer_that_does_more_has_no_plain_weight(change: Callable[[nn.Linear], nn.Module]) -> None:
    layer = nn.Linear(4, 3)
    assert plain_weight(layer) is layer.weight
    assert plain_weight(change(layer)) is None


def test_plain_is_also_a_layer_in_a_functional_call() -> None:
    """As in torch.func's gradients, where the parameters are tensors."""
    layer, weight = nn.Linear(4, 3), torch.randn(3, 4)
    seen: list[Tensor | None] = []

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> None:
            seen.append(plain_weight(self.layer))

    torch.func.functional_call(Reader(), {"layer.weight": weight}, ())
    assert seen[0] is weight


@pytest.mark.parametrize("change", [lambda layer: layer, hooked, patched, nn.Sequential])
def test_a_call_in_another_dtype(change: Callable[[nn.Linear], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = change(nn.Linear(4, 3)).bfloat16()
    x = torch.randn(5, 4)
    wanted = change_of(layer, x)
    assert_close(call_in(layer, x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(call_in(layer, x), wanted)
    call_in(layer, x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


def change_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in float32, by another way: all its parameters moved there and back."""
    found = layer.float()(x).detach()
    layer.bfloat16()
    return found  # type: ignore[no-any-return]


def test_own_dtype_and_unit() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with own_dtype(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype)
        assert_close(unit(rows), torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=dtype))


def test_norm_between_dtypes() -> None:
    norm, x = RMSNorm(4, eps=1e-6), torch.randn(3, 4)
    assert_close(norm(x), nn.functional.rms_norm(x, (4,), eps=1e-6))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm.bfloat16()(x).dtype == torch.float32
