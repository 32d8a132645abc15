"""Linformer against loops; with the identity as its projection it is plain attention."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.tokens.linformer import Linformer


def build(**config):
    torch.manual_seed(0)
    return Linformer(12, 3, **{"max_length": 10, "compressed_length": 4, **config}).double().eval()


def by_loops(module, x, source, real):
    (n, dim), m, heads = x.shape, len(source), module.heads
    d = dim // heads
    key_mix = module.key_mix
    value_mix = key_mix if module.value_mix is None else module.value_mix
    bias = torch.zeros(dim, dtype=x.dtype)
    q_bias, k_bias, v_bias = (bias if p.bias is None else p.bias for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = torch.zeros(n, dim, dtype=x.dtype)
    for h in range(heads):
        rows, of = slice(h * d, (h + 1) * d), min(h, len(key_mix) - 1)
        keys, values = [], []
        for r in range(key_mix.shape[1]):
            short_k = sum(key_mix[of, r, t] * source[t] for t in range(m) if real[t])
            short_v = sum(value_mix[of, r, t] * source[t] for t in range(m) if real[t])
            keys.append(module.k_proj.weight[rows] @ short_k + k_bias[rows])
            values.append(module.v_proj.weight[rows] @ short_v + v_bias[rows])
        for i in range(n):
            q = module.q_proj.weight[rows] @ x[i] + q_bias[rows]
            score = [(q @ k / d**0.5).exp() for k in keys]
            mixed[i, rows] = sum(s / sum(score) * v for s, v in zip(score, values, strict=True))
    return module.o_proj(mixed)


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_equation(sharing, bias):
    module, x, context = (
        build(sharing=sharing, bias=bias),
        torch.randn(2, 5, 12).double(),
        torch.randn(2, 9, 12).double(),
    )
    real = torch.arange(9)[None] < torch.tensor([[9], [6]])
    found = module(x, context, mask=real).output
    for row in range(2):
        torch.testing.assert_close(found[row], by_loops(module, x[row], context[row], real[row]))
    torch.testing.assert_close(module(x).output[0], by_loops(module, x[0], x[0], [True] * 5))


@torch.no_grad()
def test_identity_projection_is_attention():
    module, x = build(compressed_length=10, sharing="kv"), torch.randn(2, 10, 12).double()
    module.key_mix.copy_(torch.eye(10)[None])
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    wanted = module.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x).output, wanted)


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv"])
@torch.no_grad()
def test_weights_times_values(sharing):
    module, x = build(sharing=sharing), torch.randn(2, 7, 12).double()
    result = module(x, need_weights=True)
    v = module.v_proj(x).unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(module.o_proj((result.weights @ v).transpose(1, 2).flatten(2)), result.output)


@torch.no_grad()
def test_kernel_and_stages_agree():
    module, x = build(max_length=64, compressed_length=32), torch.randn(2, 40, 12).double()
    torch.testing.assert_close(module(x).output, module(x, need_weights=True).output)


def test_sharing_sets_the_number_of_projections():
    count = {
        sharing: sum(p.numel() for name, p in build(sharing=sharing).named_parameters() if "mix" in name)
        for sharing in ("none", "headwise", "kv")
    }
    assert count == {"none": 2 * 3 * 40, "headwise": 2 * 40, "kv": 40}


def test_refusals():
    with pytest.raises(ValueError, match=r"linformer: 11 tokens in x of shape .* max_length=10"):
        build()(torch.randn(1, 11, 12).double())
    with pytest.raises(ValueError, match="linformer: 11 tokens in the context"):
        build()(torch.randn(1, 2, 12).double(), torch.randn(1, 11, 12).double())
    with pytest.raises(ValueError, match="sharing='layerwise'"):
        build(sharing="layerwise")
    with pytest.raises(ValueError, match="compressed_length=11"):
        build(compressed_length=11)
    with pytest.raises(ValueError, match="dense mask"):
        build()(torch.randn(1, 3, 12).double(), mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
