"""Models exported whole, with a length that may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import causal_lm, tokens
from torch import Tensor, nn
from torch.testing import assert_close

from manyheads import create_attention


class Logits(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.model = causal_lm(*names)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_exported_with_a_length_that_changes() -> None:
    module = Logits("softmax", "mla")
    exported = torch.export.export(
        module, (tokens(2, 12),), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=60)},), strict=False
    ).module()
    for n in (5, 17):
        with torch.no_grad():
            assert_close(exported(tokens(2, n)), module(tokens(2, n)))


class Masked(nn.Module):
    """One layer, with left padding and the positions that follow it, or with neither."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.layer = create_attention(name, 16, 4, causal=True, rotary={}, **settings)

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return self.layer(x, mask=mask, positions=positions).output


def inputs(n: int, padded: bool) -> tuple[Tensor, ...]:
    x = torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n))
    mask = torch.arange(n) >= torch.tensor([[0], [2]])
    return (x, mask, (mask.long().cumsum(1) - 1).clamp(min=0)) if padded else (x,)


LAYERS = [("softmax", {}), ("softmax", {"shell": {"window": 8}}), ("mswa", {"window": 4}), ("moba", {"block": 3})]


# Without padding those with a window or blocks go the way that is compiled below, at the same lengths.
@pytest.mark.parametrize(("name", "settings", "padded"), [(*LAYERS[0], False), *((*layer, True) for layer in LAYERS)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_layers_exported_with_a_length_that_changes(name: str, settings: dict[str, Any], padded: bool) -> None:
    """Within a window, over many blocks, and over more rows than are masked at once."""
    module, n = Masked(name, **settings), torch.export.Dim("n", min=2, max=4096)
    given = inputs(12, padded)
    exported = torch.export.export(module, given, dynamic_shapes=({1: n},) * len(given), strict=False).module()
    for length in (3, 8, 41, 600):
        with torch.no_grad():
            assert_close(exported(*inputs(length, padded)), module(*inputs(length, padded)))


@pytest.mark.parametrize(("name", "settings"), LAYERS[1:])
def test_layers_compiled_whole_and_once_for_every_length(name: str, settings: dict[str, Any]) -> None:
    graphs: list[Any] = []

    def kept(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    module = Masked(name, **settings)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=kept)
    for length in (5, 8, 41, 600):
        x = inputs(length, False)[0].requires_grad_()
        found, wanted = compiled(x), module(x)
        assert_close(found, wanted)
        ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted))
        assert_close(ours, theirs)
    assert len(graphs) == 1
