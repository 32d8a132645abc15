"""Long causal passes that are computed as several: values, gradients and states are those of one pass."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from manyheads import create_attention
from manyheads.functional import kernelised

NAMES = ["fastmax", "flow", "lln", "transnormerllm", "h3"]


@pytest.mark.parametrize("name", NAMES)
def test_stretches_equal_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = create_attention(name, 8, 2, causal=True).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    mask = torch.arange(13)[None] >= torch.tensor([[0], [6]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    results = []
    for size in (2048, 5):
        monkeypatch.setattr(kernelised, "STRETCH", size)
        row = x.clone().requires_grad_()
        output = module(row, mask=mask, positions=positions).output[mask]
        grads = torch.autograd.grad(output.square().sum(), [row, *module.parameters()])
        state = module.init_state(2)
        with torch.no_grad():
            module(x[:, :11], mask=mask[:, :11], positions=positions[:, :11], state=state)
            rest = module(x[:, 11:], mask=mask[:, 11:], positions=positions[:, 11:], state=state).output
        assert state.length == 13
        results.append([output, *grads, rest])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_still_of_the_whole_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelised, "STRETCH", 4)
    torch.manual_seed(0)
    module = create_attention(name, 8, 2, causal=True).double()
    result = module(torch.randn(1, 9, 8, dtype=torch.float64), need_weights=True)
    assert result.weights.shape == (1, 2, 9, 9)
    assert (result.weights.tril(-5).abs() > 0).any()


def test_only_long_causal_passes_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelised, "STRETCH", 4)
    torch.manual_seed(0)
    for name in ("fastmax", "flow", "lln"):
        module = create_attention(name, 8, 2).double()
        x = torch.randn(1, 9, 8, dtype=torch.float64)
        changed = x.clone()
        changed[:, -1] += 1.0
        assert ((module(changed).output - module(x).output)[:, 0].abs() > 1e-9).any()
