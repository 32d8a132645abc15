"""Terminator's block with torch's own functions, features first; its kernels of coordinates against loops."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.terminator import HyperChannel, Terminator


def shaken(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double().eval()


def build(heads=4, **config):
    torch.manual_seed(0)
    return shaken(Terminator(4, heads, **{"size": 5, "hidden": 3, "windows": (3, 1, 3, 5), **config}))


def std(maps):
    return F.instance_norm(maps, eps=1e-5)


def one(layer, maps):
    """A layer over features, for maps [1, e, h, w]."""
    return layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def kernel(slow, *places):
    """The slow net at one place, feature by feature."""
    c = torch.tensor([-1 + 2 * place / max(slow.size - 1, 1) for place in places]).double()
    h = torch.sin(slow.filters[0](c))
    for filtered, linear in zip(slow.filters[1:], slow.linears, strict=True):
        h = torch.sin(filtered(c)) * linear(h) + slow.place_bias[places]
    return slow.out(h)


def over_map(slow, height, width):
    rows = [torch.stack([kernel(slow, i, j) for j in range(width)]) for i in range(height)]
    return torch.stack(rows).permute(2, 0, 1)[None]


def channel_score(slow, maps):
    means = maps.mean((2, 3))[0]
    return torch.stack([kernel(slow, c)[0] * means[c] ** 2 for c in range(len(means))])[None, :, None, None]


def gated(unit, maps):
    inner = F.gelu(std(one(unit.key, maps) * one(unit.query, one(unit.value, maps))))
    return one(unit.out, inner + unit.place_bias[: maps.shape[2], : maps.shape[3]])


def local(part, seen, maps):
    size = part.slow.size
    small = F.gelu(one(part.seen_proj, one(part.reduce, F.adaptive_avg_pool2d(seen, size))))
    windows = part.slow([one(scale, small).permute(0, 2, 3, 1) for scale in part.scales]).permute(3, 0, 1, 2)
    wide = windows.repeat_interleave(maps.shape[1] // len(windows), 0)
    found = one(part.channel_mixer, F.conv2d(maps, wide, padding=size // 2, groups=maps.shape[1]))
    return F.gelu(std(found)) + part.fast_bias


def by_branches(module, x):
    """x [n, n, 4], one square image"""
    z, side = x.permute(2, 0, 1)[None], x.shape[0]
    rows = z * over_map(module.slow, side, side).repeat_interleave(4 // module.heads, 1)
    fast = std(gated(module.gated, z) + gated(module.gated_slow, rows))
    mixed, channels = std(one(module.mixer, z)), std(z * channel_score(module.channels, z).sigmoid())
    whole = rows @ fast
    place = over_map(module.crossed_places, side, side) * whole.mean(1, keepdim=True) ** 2
    crossed = z * (place * channel_score(module.crossed_channels, whole)).sigmoid()
    first, second, third, fourth = module.local
    views = [
        whole,
        local(second, channels, z),
        fast,
        rows @ mixed,
        local(first, z, channels),
        whole * whole.sigmoid(),
        local(third, mixed, z),
        rows @ channels,
        local(fourth, z, mixed),
        crossed,
    ]
    return (F.gelu(std(one(module.out_proj, torch.cat(views, 1)))) + module.bias)[0].permute(1, 2, 0)


@pytest.mark.parametrize("config", [{}, {"heads": 2, "layers": 1}])
@torch.no_grad()
def test_equation(config):
    module, x = build(**config), torch.randn(2, 5, 5, 4).double()
    torch.testing.assert_close(module(x).output[1], by_branches(module, x[1]))
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[1, 4], mask[1, :, 4] = False, False
    torch.testing.assert_close(module(x, mask=mask).output[1, :4, :4], by_branches(module, x[1, :4, :4]))


@torch.no_grad()
def test_maps_that_are_not_square_are_filled_up_with_zeros():
    """The whole-map products are those of a square map whose further rows hold nothing."""
    module, x = build(), torch.randn(1, 5, 3, 4).double()
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[:, :, :3] = True
    torch.testing.assert_close(module(F.pad(x, (0, 0, 0, 2)), mask=mask).output[:, :, :3], module(x).output)


@torch.no_grad()
def test_hyper_channel():
    torch.manual_seed(0)
    module, x = shaken(HyperChannel(4, 1, hidden=3)), 2 * torch.randn(2, 3, 5, 4).double()
    z = x[1].permute(2, 0, 1)[None]
    wanted = (z * channel_score(module.slow, z).sigmoid())[0].permute(1, 2, 0)
    torch.testing.assert_close(module(x).output[1], wanted)


def test_refusals():
    for wrong in ({"windows": (3, 3, 3)}, {"windows": (3, 2, 3, 3)}, {"size": 0}):
        with pytest.raises(ValueError, match="terminator: size"):
            build(**wrong)
    with pytest.raises(ValueError, match="size=6 or more"):
        build()(torch.randn(1, 6, 2, 4).double())
    with pytest.raises(ValueError, match="hyper-channel: hidden"):
        HyperChannel(4, 1, hidden=0)
