"""MossFormer's joint attention against loops, and its two halves alone."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.functional.rotary import rotate
from manyheads.mechanisms.convolution.mossformer import MossFormer


def build(heads=1, **config):
    torch.manual_seed(0)
    config = {"chunk": 4, "query_dim": 6, "value_dim": 10, "kernel_size": 3, **config}
    module = MossFormer(8, heads, **config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return module


def conv_module(module, x, size):
    """One sequence, one token and tap at a time."""
    rows = []
    for row in x:
        centred = row - row.mean()
        normed = centred / (centred.square().mean() + 1e-5).sqrt() * module.norm.weight + module.norm.bias
        h = module.linear.weight @ normed + module.linear.bias
        rows.append(h * torch.sigmoid(h))
    out = []
    for t, row in enumerate(rows):
        total = row.clone()
        for tap in range(size):
            source = t + tap - size // 2
            if 0 <= source < len(rows):
                total += module.conv.weight[:, 0, tap] * rows[source]
        out.append(total)
    return torch.stack(out)


def by_loops(module, x, size=3):
    n, chunk = len(x), module.chunk
    v, u, z = (conv_module(m, x, size) for m in (module.to_v, module.to_u, module.to_z))
    places, width = torch.arange(n)[None], v.shape[1] // module.heads
    of_v, of_u = torch.zeros_like(v), torch.zeros_like(u)
    for h in range(module.heads):
        kinds, part = (
            [z * module.gamma[s, h] + module.beta[s, h] for s in range(4)],
            slice(h * width, h * width + width),
        )
        q, far_q, k, far_k = (rotate(kind[None, None], places, module.rotary)[0, 0] for kind in kinds)
        for i, j in torch.cartesian_prod(torch.arange(n), torch.arange(n)).tolist():
            weight = far_q[i] @ far_k[j] / n
            if i // chunk == j // chunk:
                weight = weight + torch.relu(q[i] @ k[j] / chunk) ** 2
            of_v[i, part] += weight * v[j, part]
            of_u[i, part] += weight * u[j, part]
    return conv_module(module.to_out, of_u * v * torch.sigmoid(of_v * u), size)


@pytest.mark.parametrize("n", [1, 3, 4, 10])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_equation(n, need_weights, heads):
    module, x = build(heads), torch.randn(2, n, 8).double()
    torch.testing.assert_close(module(x, need_weights=need_weights).output[1], by_loops(module, x[1]))


@torch.no_grad()
def test_padding_is_a_shorter_sequence():
    module, x = build(kernel_size=5), torch.randn(2, 10, 8).double()
    real = torch.tensor([[True] * 10, [True] * 6 + [False] * 4])
    torch.testing.assert_close(module(x, mask=real).output[1, :6], by_loops(module, x[1, :6], 5))


@torch.no_grad()
def test_without_linear_attention_chunks_do_not_see_each_other():
    module, x = build(), torch.randn(1, 12, 8).double()
    module.gamma[1] = module.beta[1] = 0  # q'
    weights = module(x, need_weights=True).weights[0, 0]
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    torch.testing.assert_close(weights[~blocks], torch.zeros(96).double())
    assert bool((weights >= 0).all())
    module.beta[0] = module.gamma[0] = 0  # q
    torch.testing.assert_close(module(x, need_weights=True).weights[0, 0], torch.zeros(12, 12).double())


@pytest.mark.parametrize("query_dim", [33, 40, 98, 128, 206])
@torch.no_grad()
def test_at_most_32_features_are_turned(query_dim):
    module, x = build(query_dim=query_dim), torch.randn(1, 6, 8).double()
    kinds = torch.randn(1, 4, 6, query_dim).double()
    turned = rotate(kinds, torch.arange(6)[None], module.rotary)
    torch.testing.assert_close(turned[..., 32:], kinds[..., 32:])
    assert (turned - kinds)[:, :, 1:, :32].abs().amax((0, 1, 2)).min() > 0
    assert bool(F.mse_loss(module(x).output, module(x, positions=torch.arange(6) * 3).output) > 0)


@pytest.mark.parametrize(
    "config", [{"chunk": 0}, {"kernel_size": 4}, {"value_dim": 0}, {"query_dim": 1}, {"query_dim": 0}]
)
def test_refusals(config):
    with pytest.raises(ValueError, match="mossformer"):
        MossFormer(8, 1, **config)


def test_heads_split_the_values():
    with pytest.raises(ValueError, match="multiple of heads=3"):
        MossFormer(8, 3, value_dim=10)
