"""Local attention between two maps by loops, the places outside as the released kernel has them."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.deep_interaction import DeepInteraction


def build(**config):
    torch.manual_seed(0)
    module = DeepInteraction(6, **{"window": 3, **config}).double().eval()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return module


def layers(part, cell):
    for layer, norm in zip(part.layers, part.norms, strict=True):
        scaled = (layer(cell) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        cell = (scaled * norm.weight + norm.bias).clamp(min=0)
    return cell


def by_loops(module, target, source, real):
    height, width, _ = target.shape
    y, half = torch.zeros_like(target), module.window // 2
    for i in range(height):
        for j in range(width):
            q, scores, values = layers(module.query, target[i, j]), [], []
            for r in range(i - half, i + half + 1):
                for c in range(j - half, j + half + 1):
                    inside = 0 <= r < height and 0 <= c < width and real[r, c]
                    scores.append(q @ layers(module.key, source[r, c]) / 6**0.5 if inside else q.new_zeros(()))
                    values.append(layers(module.value, source[r, c]) if inside else torch.zeros_like(q))
            y[i, j] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return y


@pytest.mark.parametrize("window", [1, 3, 5])
@torch.no_grad()
def test_equation(window):
    module, (a, b) = build(window=window), 2 * torch.randn(2, 2, 3, 4, 6).double()
    everywhere = torch.ones(2, 3, 4, dtype=torch.bool)
    torch.testing.assert_close(module((a, b)).output[1], by_loops(module, a[1], b[1], everywhere[1]))
    real = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    found = module((a, b), mask=(everywhere, real)).output[1]
    torch.testing.assert_close(found, by_loops(module, a[1], b[1], real[1]))


@torch.no_grad()
def test_padded_maps_give_what_smaller_ones_give():
    module, (a, b) = build(), torch.randn(2, 2, 3, 4, 6).double()
    real = F.pad(torch.ones(2, 3, 4, dtype=torch.bool), (0, 2, 0, 1))
    given = tuple(F.pad(t, (0, 0, 0, 2, 0, 1), value=50.0) for t in (a, b))
    torch.testing.assert_close(module(given, mask=(real, real)).output[real], module((a, b)).output.flatten(0, 2))


def test_refusals():
    with pytest.raises(ValueError, match=r"window=4"):
        build(window=4)
    with pytest.raises(ValueError, match="want two of one size"):
        build()((torch.zeros(1, 3, 3, 6).double(), torch.zeros(1, 3, 4, 6).double()))
