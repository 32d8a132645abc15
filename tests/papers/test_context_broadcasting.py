"""Context broadcasting (arXiv:2210.08457) against loops."""

import pytest
import torch

from manyheads.mechanisms.scoring.context_broadcasting import ContextBroadcasting


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, scaled: bool) -> None:
    module = ContextBroadcasting(6, 2, causal=causal, scaled=scaled).double()
    if scaled:
        module.scale.normal_()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    found = module(x, mask=mask).output
    for b in range(2):
        for i in range(7 if b == 0 else 4):
            seen = [x[b, j] for j in range(i + 1 if causal else 7) if mask[b, j]]
            mean = sum(seen) / len(seen)
            wanted = x[b, i] + module.scale * mean if scaled else (x[b, i] + mean) / 2
            torch.testing.assert_close(found[b, i], wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_weights_times_tokens_are_the_output(causal: bool) -> None:
    module = ContextBroadcasting(6, 2, causal=causal).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    result = module(x, mask=mask, need_weights=True)
    for head in range(2):
        torch.testing.assert_close(result.weights[:, head] @ x, result.output)
    torch.testing.assert_close(result.weights[0].sum(-1), torch.ones(2, 7, dtype=torch.float64))


def test_grid_is_its_cells() -> None:
    module, x = ContextBroadcasting(6, 2), torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(module(x).output.flatten(1, 2), module(x.flatten(1, 2)).output)
    with pytest.raises(ValueError, match="grid has no past"):
        ContextBroadcasting(6, 2, causal=True)(x)


def test_has_no_parameters() -> None:
    assert not list(ContextBroadcasting(6, 2).parameters())


def test_a_constant_sequence_stays() -> None:
    x = torch.randn(1, 1, 6).expand(1, 5, 6)
    torch.testing.assert_close(ContextBroadcasting(6, 2)(x).output, x)
