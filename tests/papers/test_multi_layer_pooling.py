"""Multi-layers trainable pooling against loops over queries, heads and layers."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.pooling.multi_layer import MultiLayerPooling


def build(**config):
    torch.manual_seed(0)
    module = MultiLayerPooling(8, 2, **{"layers": 6, "latents": 3, "expand": 2, **config}).double()
    with torch.no_grad():
        for norm in (module.norm_latents, module.norm_layers, module.norm_ff):
            norm.weight.normal_()
            norm.bias.normal_()
    return module


def norm_of(norm, vector):
    centred = vector - vector.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def by_loops(module, x, real):
    held = {t: norm_of(module.norm_layers, x[t] + module.place.weight[t]) for t in range(len(x)) if real[t]}
    total = torch.zeros(8).double()
    for latent in module.latents:
        q, mixed = module.q_proj.weight @ norm_of(module.norm_latents, latent), torch.zeros(8).double()
        for part in (slice(0, 4), slice(4, 8)):
            score = {t: (q[part] * (module.k_proj.weight @ h)[part]).sum().div(2).exp() for t, h in held.items()}
            for t, s in score.items():
                mixed[part] += s / sum(score.values()) * (module.v_proj.weight @ held[t])[part]
        z = latent + module.o_proj.weight @ mixed
        inner = module.ff_in.weight @ norm_of(module.norm_ff, z) + module.ff_in.bias
        total += z + module.ff_out.weight @ (inner[:16] * F.gelu(inner[16:])) + module.ff_out.bias
    mean = total / len(module.latents)
    return mean / mean.pow(2).sum().sqrt()


@torch.no_grad()
def test_equation():
    module, x = build(), torch.randn(2, 5, 8).double()
    real = torch.tensor([[True] * 5, [True, False, True, True, False]])
    result = module(x, mask=real, need_weights=True)
    for row in range(2):
        torch.testing.assert_close(result.output[row], by_loops(module, x[row], real[row]))
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 2, 1).double())
    torch.testing.assert_close(result.output.norm(dim=-1), torch.ones(2).double())


@torch.no_grad()
def test_layers_are_told_apart_by_their_place_only():
    module, x = build(), torch.randn(2, 5, 8).double()
    swapped = module(x.flip(1)).output
    assert (swapped - module(x).output).abs().max() > 1e-3
    module.place.weight.zero_()
    torch.testing.assert_close(module(x.flip(1)).output, module(x).output)


def test_refuses_more_layers_than_it_has():
    with pytest.raises(ValueError, match="7 layers"):
        build()(torch.randn(1, 7, 8).double())
    with pytest.raises(ValueError, match="positive"):
        build(latents=0)
