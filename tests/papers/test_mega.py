"""Mega against loops in the order of the paper, and its moving average against the recurrence and torch's FFT."""

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads.functional.ema import damped_ema
from manyheads.mechanisms.recurrent import mega
from manyheads.mechanisms.recurrent.mega import Mega
from manyheads.testing import check_mechanism


def build(**config):
    torch.manual_seed(0)
    module = Mega(8, **{"heads": 1, "ema_dim": 3, "chunk": 4, **config}).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return module


def moved_by_loops(module, x, real):
    """silu(EMA(x) + omega x), one number at a time, from the left and, where it exists, from the right."""
    n, dim = x.shape
    y = module.omega * x
    for side in range(len(module.ema_alpha)):
        order = range(n) if side == 0 else range(n - 1, -1, -1)
        for c in range(dim):
            for s in range(module.ema_alpha.shape[-1]):
                alpha, delta, beta, eta = (
                    p[side, c, s] for p in (module.ema_alpha, module.ema_delta, module.ema_beta, module.ema_eta)
                )
                p, h = torch.sigmoid(alpha), torch.zeros((), dtype=x.dtype)
                for t in order:
                    h = p * beta * (x[t, c] if real[t] else 0.0) + (1 - p * torch.sigmoid(delta)) * h
                    y[t, c] += eta * h / math.sqrt(module.ema_alpha.shape[-1])
    return F.silu(y)


def turned(vector, position):
    half = len(vector) // 2
    angle = torch.tensor([position * 10000.0 ** (-2 * i / len(vector)) for i in range(half)], dtype=vector.dtype)
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def by_loops(module, x, real):
    n, dim = x.shape
    heads, zh, vh = module.heads, module.z_dim // module.heads, module.v_dim // module.heads
    moved = moved_by_loops(module, x, real)
    base = moved @ module.ema_proj.weight.T + module.ema_proj.bias
    phi, z, r, hx = base.split([dim, module.z_dim, module.v_dim, dim], -1)
    z, r, v = F.silu(z), F.silu(r), F.silu(x @ module.v_proj.weight.T + module.v_proj.bias)
    q, k = z * module.kappa[0] + module.mu[0], z * module.kappa[1] + module.mu[1]
    mixed, matrix = torch.zeros(n, module.v_dim, dtype=x.dtype), torch.zeros(heads, n, n, dtype=x.dtype)
    for h in range(heads):
        zs, vs = slice(h * zh, (h + 1) * zh), slice(h * vh, (h + 1) * vh)
        for i in range(n):
            keys = [j for j in range(n) if real[j] and (j <= i or not module.causal)]
            keys = [j for j in keys if module.chunk is None or i // module.chunk == j // module.chunk]
            scale = 1 / math.sqrt(zh) if module.normaliser == "softmax" else 1 / max(len(keys), 1)
            for j in keys:
                bias = turned(module.place[0, h], i) @ turned(module.place[1, h], j)
                score = scale * (q[i, zs] @ k[j, zs]) + bias
                if module.normaliser == "softmax":
                    matrix[h, i, j] = score.exp()
                elif module.normaliser == "relu2":
                    matrix[h, i, j] = score**2 if score > 0 else 0.0
                else:
                    mean, deviation = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
                    matrix[h, i, j] = 0.5 * (1 + torch.erf((score - mean) / (deviation * math.sqrt(2))))
            if module.normaliser == "softmax" and keys:
                matrix[h, i] = matrix[h, i] / matrix[h, i].sum()
            mixed[i, vs] = matrix[h, i] @ v[:, vs]
    gate = torch.sigmoid(phi)
    h = F.silu(hx + (r * mixed) @ module.h_proj.weight.T + module.h_proj.bias)
    return gate * h + (1 - gate) * x, matrix


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normaliser", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize(("heads", "chunk"), [(1, 4), (2, 4), (1, None), (1, 3)])
@torch.no_grad()
def test_equation(causal, normaliser, heads, chunk):
    module = build(causal=causal, normaliser=normaliser, heads=heads, chunk=chunk)
    x, real = torch.randn(2, 10, 8).double(), torch.arange(10)[None] < torch.tensor([[10], [7]])
    result = module(x, mask=real, need_weights=True)
    for row, length in enumerate((10, 7)):
        output, matrix = by_loops(module, x[row], real[row])
        torch.testing.assert_close(result.output[row, :length], output[:length])
        torch.testing.assert_close(result.weights[row, :, :length], matrix[:, :length])


def ema_inputs(n):
    torch.manual_seed(n)
    decay, gain, out = torch.rand(5, 3).double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    return torch.randn(2, n, 5).double(), decay, gain, out, torch.randn(2, 5, 3).double()


@pytest.mark.parametrize("n", [1, 3, 4, 9, 30])
def test_ema_in_blocks_is_the_recurrence(n):
    x, decay, gain, out, h = ema_inputs(n)
    y, last = damped_ema(x, decay, gain, out, h, block=4)
    for t in range(n):
        h = decay * h + gain * x[:, t, :, None]
        torch.testing.assert_close(y[:, t], (h * out).sum(-1))
    torch.testing.assert_close(last, h)


def test_ema_is_the_convolution_by_fft():
    x, decay, gain, out, _ = ema_inputs(50)
    kernel = torch.stack([(gain * out * decay**t).sum(-1) for t in range(50)])
    wanted = torch.fft.irfft(torch.fft.rfft(x, 100, dim=1) * torch.fft.rfft(kernel, 100, dim=0), 100, dim=1)[:, :50]
    torch.testing.assert_close(damped_ema(x, decay, gain, out, block=8)[0], wanted)


def test_ema_with_a_decay_of_zero_or_one():
    x, _, gain, out, _ = ema_inputs(9)
    ends = torch.tensor([[0.0, 1.0, 0.0]] * 5).double().requires_grad_()
    y, _ = damped_ema(x, ends, gain, out, block=4)
    part = gain * out
    torch.testing.assert_close(y, (part[:, 0] + part[:, 2]) * x + part[:, 1] * x.cumsum(1))
    y.sum().backward()
    assert bool(ends.grad.isfinite().all())


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_chunk_as_long_as_the_sequence_is_no_chunk(causal):
    whole, one = build(causal=causal, chunk=None), build(causal=causal, chunk=11)
    x = torch.randn(2, 11, 8).double()
    torch.testing.assert_close(whole(x).output, one(x).output)


@torch.no_grad()
def test_bias_depends_on_distance_alone():
    module = build(chunk=None, causal=True)
    module.kappa.zero_()
    module.mu.zero_()
    weights = module(torch.randn(1, 9, 8).double(), need_weights=True).weights[0, 0]
    for back in (1, 2, 3):
        ratio = weights.diagonal(-back) / weights.diagonal()[back:]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pad", [1, 2, 5])
@torch.no_grad()
def test_chunks_follow_positions(causal, pad):
    module, x = build(causal=causal), torch.randn(2, 10, 8).double()
    dirty = torch.cat([torch.full((2, pad, 8), 1e3).double(), x], 1)
    mask = (torch.arange(10 + pad) >= pad).expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = module(dirty, mask=mask, positions=positions, need_weights=True)
    wanted = module(x, need_weights=True)
    torch.testing.assert_close(found.output[:, pad:], wanted.output)
    torch.testing.assert_close(found.weights[:, :, pad:, pad:], wanted.weights)


@torch.no_grad()
def test_far_positions_lose_no_precision():
    module, x = build(causal=True).float(), torch.randn(1, 10, 8)
    torch.testing.assert_close(module(x, positions=torch.arange(10) + 4 * 10**7).output, module(x).output)


@torch.no_grad()
def test_weights_of_a_pass_with_a_state_cover_what_was_seen():
    for chunk in (4, None):
        module, x = build(causal=True, chunk=chunk), torch.randn(2, 11, 8).double()
        whole, state = module(x, need_weights=True), module.init_state(2)
        module(x[:, :6], state=state)
        rest = module(x[:, 6:], state=state, need_weights=True)
        torch.testing.assert_close(rest.weights, whole.weights[:, :, 6:])


@torch.no_grad()
def test_long_pass_in_stretches(monkeypatch):
    module, x = build(causal=True), torch.randn(2, 37, 8).double()
    mask = torch.arange(37)[None] >= torch.tensor([[0], [11]])
    given = {"mask": mask, "positions": (mask.cumsum(1) - 1).clamp(min=0)}
    wanted, plain = module(x, **given).output, module(x).output
    monkeypatch.setattr(mega, "STRETCH", 7)
    torch.testing.assert_close(module(x, **given).output[mask], wanted[mask])
    torch.testing.assert_close(module(x).output, plain)
    state = module.init_state(2)
    parts = [module(x[:, s], state=state).output for s in (slice(0, 10), slice(10, 37))]
    torch.testing.assert_close(torch.cat(parts, 1), plain)
    assert state.length == 37


@torch.no_grad()
def test_state_takes_the_same_bytes_from_the_first_pass_on():
    module, sizes = build(causal=True), []
    state = module.init_state(2)
    for n in (1, 30, 2, 5):
        module(torch.randn(2, n, 8).double(), state=state)
        sizes.append(state.nbytes)
    assert sizes == sizes[:1] * 4


def test_conformance_of_squared_relu():
    check_mechanism(Mega, config={"normaliser": "relu2"}, largest=9)


def test_refusals():
    with pytest.raises(ValueError, match="normaliser='relu'"):
        build(normaliser="relu")
    with pytest.raises(ValueError, match="z_dim=6, v_dim=16 for heads=2"):
        build(heads=2, z_dim=6)
    with pytest.raises(ValueError, match="chunk=0"):
        build(chunk=0)
    with pytest.raises(ValueError, match="dense mask"):
        build()(torch.randn(1, 3, 8).double(), mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
