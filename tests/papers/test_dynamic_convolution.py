"""Dynamic convolution against loops over taps, and against convolutions of torch where the kernel is constant."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution import dynamic_convolution
from manyheads.mechanisms.convolution.dynamic_convolution import DynamicConvolution


def build(**config):
    torch.manual_seed(0)
    return DynamicConvolution(12, 3, **config).double().eval()


def by_loops(module, x, real=None):
    """The equation, one tap of one channel of one token at a time."""
    (n, dim), k, heads = x.shape, module.kernel_size, module.heads
    gate = module.in_proj(x)
    u = gate[:, :dim] * torch.sigmoid(gate[:, dim:])
    left = k - 1 if module.causal else k // 2
    y = torch.zeros(n, dim, dtype=x.dtype)
    for t in range(n):
        logits = module.kernel_proj.weight @ u[t]
        for c in range(dim):
            head = c // (dim // heads)
            own = logits[head * k : (head + 1) * k].exp()
            for tap in range(k):
                source = t - left + tap
                if 0 <= source < n and (real is None or real[source]):
                    y[t, c] += own[tap] / own.sum() * u[source, c]
    return module.out_proj(y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel_size", [2, 3, 4, 9])
@torch.no_grad()
def test_equation(causal, kernel_size):
    module, x = build(causal=causal, kernel_size=kernel_size), torch.randn(2, 7, 12).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    real = torch.tensor([[True] * 7, [True, True, False, True, True, False, False]])
    found = module(x, mask=real).output[1]
    torch.testing.assert_close(found[real[1]], by_loops(module, x[1], real[1])[real[1]])


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_constant_kernel_is_a_moving_average(causal):
    module, x = build(causal=causal, kernel_size=5), torch.randn(2, 11, 12).double()
    module.kernel_proj.weight.zero_()
    u = F.pad(F.glu(module.in_proj(x), -1).transpose(1, 2), (4, 0) if causal else (2, 2))
    torch.testing.assert_close(module(x).output, module.out_proj(F.avg_pool1d(u, 5, 1).transpose(1, 2)))


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_weights_are_a_band_that_mixes_u(causal):
    module, x = build(causal=causal, kernel_size=4), torch.randn(1, 9, 12).double()
    result = module(x, need_weights=True)
    u = F.glu(module.in_proj(x), -1).unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj((result.weights @ u).transpose(1, 2).flatten(2)), result.output)
    below, above = (3, 0) if causal else (2, 1)
    torch.testing.assert_close(result.weights.tril(-below - 1), torch.zeros_like(result.weights))
    torch.testing.assert_close(result.weights.triu(above + 1), torch.zeros_like(result.weights))
    torch.testing.assert_close(result.weights[:, :, 4:8].sum(-1), torch.ones(1, 3, 4).double())


@torch.no_grad()
def test_weights_of_a_pass_with_a_state_cover_what_was_seen():
    module, x = build(causal=True, kernel_size=4), torch.randn(2, 9, 12).double()
    whole, state = module(x, need_weights=True), module.init_state(2)
    module(x[:, :6], state=state)
    rest = module(x[:, 6:], state=state, need_weights=True)
    torch.testing.assert_close(rest.weights, whole.weights[:, :, 6:])


@torch.no_grad()
def test_dense_mask_silences_taps():
    module, x = build(causal=True, kernel_size=3), torch.randn(1, 6, 12).double()
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 3] = False
    real = torch.tensor([[True, True, True, False, True, True]])
    torch.testing.assert_close(module(x, mask=mask).output, module(x, mask=real).output)


@torch.no_grad()
def test_long_pass_in_stretches(monkeypatch):
    module, x = build(causal=True, kernel_size=4), torch.randn(2, 29, 12).double()
    mask = torch.arange(29)[None] >= torch.tensor([[0], [11]])
    wanted = module(x, mask=mask).output
    monkeypatch.setattr(dynamic_convolution, "STRETCH", 8)
    torch.testing.assert_close(module(x, mask=mask).output, wanted)
    state = module.init_state(2)
    parts = [module(x[:, s], mask=mask[:, s], state=state).output for s in (slice(0, 10), slice(10, 29))]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)
    assert state.length == 29


def test_refuses_a_kernel_of_one():
    with pytest.raises(ValueError, match="dynamic-convolution: kernel_size=1"):
        DynamicConvolution(12, 3, kernel_size=1)
