"""The block of PMAA against torch's own layers, features first."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.pmaa import PMAA


def build(**config):
    torch.manual_seed(0)
    module = PMAA(6, **{"hidden": 8, "depth": 3, **config}).double().eval()
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
        for scale in module.modulate.scales:
            scale.fill_(0.5)
    return module


def normed(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def linear(layer, x):
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def separable(part, x):
    h = F.relu(normed(part.norm, part.conv(x)))
    h = normed(part.norm_out, linear(part.point, h))
    return x + h if part.skip else h


def injection(part, fine, coarse):
    def up(t):
        return F.interpolate(t, size=fine.shape[2:])

    local, given, gate = (
        normed(n, c(t)) for n, c, t in zip(part.norms, part.convs, (fine, coarse, coarse), strict=True)
    )
    return local * up(torch.sigmoid(gate)) + up(given)


def modulation(part, x):
    def last(layer, t):
        return layer(t.movedim(1, -1)).movedim(-1, 1)

    h = last(part.norm, x)
    x = x + 0.5 * linear(part.out, part.spread(F.gelu(linear(part.a, h))) * linear(part.v, h))
    h = F.gelu(linear(part.up, last(part.norm_mlp, x)))
    return x + 0.5 * linear(part.down, h + F.gelu(part.near(h)))


def by_torch(module, x):
    """As the released code goes, f of the coarsest scale left out, which nothing reads."""
    first = x.movedim(-1, 1)
    outputs = [separable(module.scales[0], separable(module.enter, first))]
    for scale in list(module.scales)[1:]:
        outputs.append(separable(scale, outputs[-1]))
    g = sum(F.adaptive_avg_pool2d(o, outputs[-1].shape[2:]) for o in outputs)
    g = modulation(module.modulate, g)
    given = [injection(part, o, g) for part, o in zip(module.give, outputs, strict=False)]
    e = given[len(given) - 2]
    for i in reversed(range(len(given))):
        e = injection(module.join[i], given[i], e)
    return linear(module.out, e).movedim(1, -1) + x


@pytest.mark.parametrize(("config", "size"), [({}, (8, 12)), ({}, (7, 5)), ({"depth": 4, "hidden": 6}, (9, 8))])
@torch.no_grad()
def test_equation(config, size):
    module, x = build(**config), torch.randn(2, *size, 6).double()
    torch.testing.assert_close(module(x).output, by_torch(module, x))


@torch.no_grad()
def test_padded_grids_give_what_smaller_ones_give():
    module, x = build(), torch.randn(2, 5, 7, 6).double()
    real = F.pad(torch.ones(2, 5, 7, dtype=torch.bool), (0, 3, 0, 2))
    found = module(F.pad(x, (0, 0, 0, 3, 0, 2), value=50.0), mask=real).output
    torch.testing.assert_close(found[real], module(x).output.flatten(0, 2))


def test_refusals():
    with pytest.raises(ValueError, match=r"depth=2"):
        build(depth=2)
