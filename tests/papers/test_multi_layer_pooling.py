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


def by_loops(module, layers, real):
    """layers: [n, layers, dim], of one sequence."""
    places = [i for i in range(len(real)) if real[i]]
    x = layers[places[-1]] if module.over == "last" else sum(layers[i] for i in places) / len(places)
    held = {t: norm_of(module.norm_layers, x[t] + module.place.weight[t]) for t in range(len(x))}
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


@pytest.mark.parametrize("over", ["last", "mean"])
@torch.no_grad()
def test_equation(over):
    module, layers = build(over=over), torch.randn(3, 5, 4, 8).double()
    x, earlier = layers[:, :, 3], layers[:, :, :3]
    real = torch.tensor([[True] * 5, [False, True, True, True, False], [False] * 4 + [True]])
    result = module(x, mask=real, need_weights=True, earlier=earlier)
    for row in range(3):
        torch.testing.assert_close(result.output[row], by_loops(module, layers[row], real[row]))
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(3, 2, 1).double())
    torch.testing.assert_close(result.output.norm(dim=-1), torch.ones(3).double())
    shares = module.layer_weights(x, earlier, mask=real)
    assert shares.shape == (3, 2, 4)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2).double())


@torch.no_grad()
def test_layers_are_told_apart_by_their_place_only():
    module, layers = build(), torch.randn(2, 5, 4, 8).double()

    def pooled(order):
        return module(layers[:, :, order[-1]], earlier=layers[:, :, order[:-1]]).output

    assert (pooled([3, 2, 1, 0]) - pooled([0, 1, 2, 3])).abs().max() > 1e-3
    module.place.weight.zero_()
    torch.testing.assert_close(pooled([3, 2, 1, 0]), pooled([0, 1, 2, 3]))


def test_refusals():
    x = torch.randn(1, 5, 8).double()
    with pytest.raises(ValueError, match="7 layers, the last among them, and the module was built for 6"):
        build()(x, earlier=torch.randn(1, 5, 6, 8).double())
    with pytest.raises(ValueError, match=r"earlier is \[1, 4, 2, 8\] on cpu; want \[1, 5, layers below, 8\]"):
        build()(x, earlier=torch.randn(1, 4, 2, 8).double())
    with pytest.raises(ValueError, match="positive"):
        build(latents=0)
    with pytest.raises(ValueError, match="over='eos'"):
        build(over="eos")
