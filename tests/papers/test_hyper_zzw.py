"""The HyperZZW operators against loops over rows, windows and coordinates."""

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.convolution.hyper_zzw import HyperZZW, HyperZZWLocal


def build(size=5, heads=4, **config):
    torch.manual_seed(0)
    module = HyperZZW(4, heads, size=size, hidden=6, layers=2, **config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def kernel_at(slow, row, column):
    """The slow network at one place."""
    step = 2 / (slow.size - 1)
    place = [-1 + step * row, -1 + step * column]
    sines = []
    for layer in slow.filters:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        sines.append(
            torch.tensor([math.sin(a * place[0] + b * place[1] + c) for (a, b), c in rows], dtype=torch.float64)
        )
    h = sines[0]
    for sine, linear in zip(sines[1:], slow.linears, strict=True):
        h = sine * (linear.weight @ h + linear.bias) + slow.place_bias[row, column]
    return slow.out.weight @ h + slow.out.bias


def by_loops(module, x):
    """One image, filled up with zeros to the size of the kernel."""
    height, width, dim = x.shape
    size = module.size
    z, values = torch.zeros(size, size, dim).double(), torch.zeros(size, size, dim).double()
    z[:height, :width] = x
    mixed = module.mixer(x).permute(2, 0, 1)[None]
    values[:height, :width] = F.instance_norm(mixed)[0].permute(1, 2, 0)
    y = torch.zeros(size, size, dim).double()
    for h in range(size):
        for v in range(size):
            weight = kernel_at(module.slow, h, v).repeat_interleave(4 // module.heads) * z[h, v]
            for w in range(size):
                y[h, w] += weight * values[v, w]
    return module.out_proj(y[:height, :width])


@pytest.mark.parametrize("shape", [(5, 5), (3, 3), (2, 4), (5, 3)])
@torch.no_grad()
def test_equation(shape):
    module, x = build(), torch.randn(2, *shape, 4).double()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))
    shared = build(heads=2)
    torch.testing.assert_close(shared(x).output[1], by_loops(shared, x[1]))


@torch.no_grad()
def test_padding_is_a_smaller_map():
    module, x = build(), torch.randn(1, 4, 5, 4).double()
    real = torch.zeros(1, 4, 5, dtype=torch.bool)
    real[:, :3, :4] = True
    found = module(x, mask=real).output[0, :3, :4]
    torch.testing.assert_close(found, by_loops(module, x[0, :3, :4]))


@torch.no_grad()
def test_the_kernel_depends_on_places_and_not_on_the_image():
    module, x = build(), torch.randn(1, 4, 4, 4).double()
    kernel = module.slow()
    torch.testing.assert_close(kernel[3, 1], kernel_at(module.slow, 3, 1))
    module.slow.out.weight.zero_()
    module.slow.out.bias.fill_(1.0)  # K = 1: the product of the two maps
    values = F.instance_norm(module.mixer(x).permute(0, 3, 1, 2))
    wanted = module.out_proj((x.permute(0, 3, 1, 2) @ values).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x).output, wanted)


def test_a_kernel_in_half_precision_is_that_of_its_weights():
    torch.manual_seed(0)
    slow = HyperZZW(4, 4, size=7, hidden=16, layers=2).slow.bfloat16()
    found = slow()
    assert found.dtype == torch.bfloat16
    # Sines of up to a hundred turns were off by a tenth of the kernel; what is left is the last rounding.
    torch.testing.assert_close(found.double(), slow.double()(), rtol=2**-8, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="size=6 or more"):
        build()(torch.randn(1, 3, 6, 4).double())
    with pytest.raises(ValueError, match="heads=3"):
        HyperZZW(4, 3)
    with pytest.raises(ValueError, match="layers=0"):
        HyperZZW(4, 4, layers=0)


def build_local(size=3, heads=4, **config):
    torch.manual_seed(1)
    module = HyperZZWLocal(4, heads, size=size, hidden=5, layers=2, **config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def standardised(maps):
    """maps [h, w, e]: each channel over the cells."""
    flat = maps.flatten(0, 1)
    return (maps - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()


def window_by_loops(module, z):
    """K of one image, [size, size, heads]: the slow network place by place, layer by layer."""
    size, slow = module.size, module.slow
    small = F.adaptive_avg_pool2d(z.permute(2, 0, 1), size).permute(1, 2, 0)
    places = {(u, v): (-1 + 2 * u / (size - 1), -1 + 2 * v / (size - 1)) for u in range(size) for v in range(size)}
    sines = [{uv: torch.sin(f(torch.tensor(at).double())) for uv, at in places.items()} for f in slow.filters]
    h = sines[0]
    for layer, (linear, scale) in enumerate(zip(slow.linears, module.scales, strict=True)):
        h = {uv: sines[layer + 1][uv] * linear(h[uv]) + slow.place_bias[uv] for uv in places}
        for feature in range(5):
            norm = math.sqrt(sum(float(h[uv][feature]) ** 2 for uv in places))
            for uv in places:
                h[uv][feature] += 0.1 * h[uv][feature] / norm
        h = {uv: h[uv] * scale(F.gelu(module.seen_proj(module.reduce(small[uv])))) for uv in places}
    return {uv: slow.out(h[uv]) for uv in places}


def local_by_loops(module, z):
    height, width, dim = z.shape
    window, values = window_by_loops(module, z), standardised(module.mixer(z))
    reach, filtered = module.size // 2, torch.zeros_like(z)
    for i in range(height):
        for j in range(width):
            for e in range(dim):
                for (u, v), weight in window.items():
                    row, column = i + u - reach, j + v - reach
                    if 0 <= row < height and 0 <= column < width:
                        filtered[i, j, e] += weight[e * module.heads // dim] * values[row, column, e]
    return F.gelu(standardised(module.channel_mixer(filtered))) + module.fast_bias


@pytest.mark.parametrize("shape", [(5, 5), (3, 4), (2, 7), (1, 2)])
@pytest.mark.parametrize("config", [{}, {"heads": 2}, {"size": 5}])
@torch.no_grad()
def test_local_equation(shape, config):
    module, x = build_local(**config), torch.randn(2, *shape, 4).double()
    for found, image in zip(module(x).output, x, strict=True):
        torch.testing.assert_close(found, local_by_loops(module, image))


@torch.no_grad()
def test_local_padding_is_a_smaller_map():
    module, x = build_local(), torch.randn(2, 5, 6, 4).double()
    real = torch.zeros(2, 5, 6, dtype=torch.bool)
    real[0, :3, :4] = True
    real[1, :4, :6] = True
    found = module(x, mask=real).output
    torch.testing.assert_close(found[0, :3, :4], local_by_loops(module, x[0, :3, :4]))
    torch.testing.assert_close(found[1, :4], local_by_loops(module, x[1, :4]))
    assert (found[~real] == 0).all()
    real[1] = False
    assert (module(x, mask=real).output[1] == 0).all()


@torch.no_grad()
def test_every_image_has_a_window_of_its_own():
    module, x = build_local(), torch.randn(2, 5, 5, 4).double()
    windows = module._windows(x, torch.ones(2, 5, 5, 1, dtype=torch.bool))
    assert (windows[0] - windows[1]).abs().max() > 1e-3
    torch.testing.assert_close(module(x).output[1:], module(x[1:]).output)
    for scale in module.scales:  # nothing seen of the image: one window for all, of coordinates alone
        scale.weight.zero_()
    windows = module._windows(x, torch.ones(2, 5, 5, 1, dtype=torch.bool))
    torch.testing.assert_close(windows[0], windows[1])


@torch.no_grad()
def test_a_window_that_is_its_centre_filters_nothing():
    module, x = build_local(heads=1), torch.randn(1, 4, 5, 4).double()
    module._windows = lambda z, real: (
        torch.zeros(1, 3, 3, 1)
        .double()
        .index_put_(tuple(torch.tensor(i) for i in (0, 1, 1, 0)), torch.tensor(1.0).double())
    )
    wanted = F.gelu(standardised(module.channel_mixer(standardised(module.mixer(x[0]))))) + module.fast_bias
    torch.testing.assert_close(module(x).output[0], wanted)


@torch.no_grad()
def test_a_hole_in_the_map_is_neither_pooled_nor_filtered():
    module, x = build_local(), torch.randn(1, 6, 6, 4).double()
    real = torch.ones(1, 6, 6, dtype=torch.bool)
    real[0, 2, 3] = False
    pooled = module._windows(torch.where(real[..., None], x, 0.0), real[..., None])
    filled = x.clone()
    filled[0, 2, 3] = (x[0, 2, 2] + x[0, 3, 2] + x[0, 3, 3]) / 3  # the mean of the others in its bin of 2 x 2
    torch.testing.assert_close(pooled, module._windows(filled, torch.ones_like(real)[..., None]))
    changed = x.clone()
    changed[0, 2, 3] = 100.0
    torch.testing.assert_close(module(x, mask=real).output, module(changed, mask=real).output)


def test_local_refusals():
    with pytest.raises(ValueError, match="size odd"):
        HyperZZWLocal(4, 4, size=4)
    with pytest.raises(ValueError, match="heads=3"):
        HyperZZWLocal(4, 3)
