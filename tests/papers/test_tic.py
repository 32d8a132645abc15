"""TiC's convolution of attention against PyTorch's unfold."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.tic import TiC


def build(heads=4, **config):
    torch.manual_seed(0)
    return TiC(12, heads, **config).double().eval()


def by_unfold(module, x):
    heads, area, pad = module.heads, module.kernel**2, module.dilation * (module.kernel // 2)
    q, k, v = (p(x).permute(0, 3, 1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    k, v = (
        F.unfold(t, module.kernel, dilation=module.dilation, padding=pad).view(2, heads, 12 // heads, area, -1)
        for t in (k, v)
    )
    scores = (q.flatten(2).view(2, heads, 12 // heads, 1, -1) * k).sum(2) * (12 // heads) ** -0.5
    o = (scores.softmax(2)[:, :, None] * v).sum(3).flatten(1, 2).view(2, 12, *x.shape[1:3])
    y = F.relu(F.conv2d(o + x.permute(0, 3, 1, 2), module.conv.weight, padding=module.kernel // 2))
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 1), (1, 1), (7, 2)])
@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_equation(kernel, dilation, heads):
    module, x = build(heads, kernel=kernel, dilation=dilation), torch.randn(2, 5, 6, 12).double()
    wanted = by_unfold(module, x)
    result = module(x, need_weights=True)
    torch.testing.assert_close(module(x).output, wanted)
    torch.testing.assert_close(result.output, wanted)
    v = module.v_proj(x).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
    o = (result.weights @ v).transpose(1, 2).reshape(2, 5, 6, 12)
    y = F.relu(F.conv2d((o + x).permute(0, 3, 1, 2), module.conv.weight, padding=kernel // 2))
    torch.testing.assert_close(y.permute(0, 2, 3, 1), wanted)


@torch.no_grad()
def test_places_outside_keep_their_weight():
    module, x = build(), torch.randn(1, 5, 5, 12).double()
    total = module(x, need_weights=True).weights.sum(-1).view(4, 5, 5)
    torch.testing.assert_close(total[:, 1:4, 1:4], torch.ones(4, 3, 3).double())
    assert bool((total[:, 0] < 1).all())


@torch.no_grad()
def test_padding_is_as_what_is_outside():
    module, x = build(dilation=2), torch.randn(2, 6, 7, 12).double()
    real = torch.zeros(2, 6, 7, dtype=torch.bool)
    real[0, :4, :5] = real[1, :, :2] = True
    found = module(x, mask=real).output
    torch.testing.assert_close(found[:1, :4, :5], module(x[:1, :4, :5]).output)
    torch.testing.assert_close(found[1:, :, :2], module(x[1:, :, :2]).output)


def test_refusals():
    for config in ({"kernel": 2}, {"dilation": 0}):
        with pytest.raises(ValueError, match="odd kernel"):
            build(**config)
