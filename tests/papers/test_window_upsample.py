"""Window attention upsampling against loops over fine cells."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.window_upsample import WindowUpsample


def build(**config):
    torch.manual_seed(0)
    return WindowUpsample(12, 4, coarse=8, **config).double().eval()


def maps(height, width):
    return torch.randn(1, height, width, 12).double(), torch.randn(1, -(-height // 2), -(-width // 2), 8).double()


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize("sizes", [(6, 8), (5, 7), (1, 1)])
@torch.no_grad()
def test_equation(window, sizes):
    module, (fine, coarse) = build(window=window), maps(*sizes)
    real = torch.rand(coarse.shape[:3], generator=torch.Generator().manual_seed(2)) < 0.7
    real[0, 0, 0] = True
    for seen in (torch.ones_like(real), real):
        mask = None if bool(seen.all()) else (torch.ones(fine.shape[:3], dtype=torch.bool), seen)
        result = module((fine, coarse), mask=mask, need_weights=True)
        torch.testing.assert_close(module((fine, coarse), mask=mask).output, result.output)
        z = module.skip(coarse) * seen[..., None]
        smooth, share = (
            F.interpolate(t.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
            for t in (z, seen[..., None].double())
        )
        for i in range(sizes[0]):
            for j in range(sizes[1]):
                below = [
                    (a, b)
                    for a in range(coarse.shape[1])
                    for b in range(coarse.shape[2])
                    if a * 2 // window == i // window and b * 2 // window == j // window and seen[0, a, b]
                ]
                mixed = torch.zeros(12).double()
                for h in range(4 if below else 0):
                    cut = slice(3 * h, 3 * h + 3)
                    q = module.q_proj(fine[0, i, j])[cut]
                    scores = torch.stack([q @ module.k_proj(coarse[(0, *c)])[cut] / 3**0.5 for c in below])
                    values = torch.stack([module.v_proj(coarse[(0, *c)])[cut] for c in below])
                    mixed[cut] = scores.softmax(0) @ values
                wanted = module.o_proj(mixed) + smooth[0, i, j] / (share[0, i, j] or 1.0)
                torch.testing.assert_close(result.output[0, i, j], wanted)
        assert result.weights.shape == (1, 4, sizes[0] * sizes[1], seen.numel())


@torch.no_grad()
def test_padded_maps_are_smaller_maps():
    module, (fine, coarse) = build(), maps(8, 9)
    mask = [torch.zeros(t.shape[:3], dtype=torch.bool) for t in (fine, coarse)]
    mask[0][:, :5, :6] = mask[1][:, :3, :3] = True
    found = module((fine, coarse), mask=mask).output[:, :5, :6]
    torch.testing.assert_close(found, module((fine[:, :5, :6], coarse[:, :3, :3])).output)


def test_maps_that_do_not_fit():
    module = build()
    with pytest.raises(ValueError, match="half the height"):
        module((torch.randn(1, 6, 6, 12).double(), torch.randn(1, 3, 4, 8).double()))
    with pytest.raises(ValueError, match="even window"):
        build(window=3)
