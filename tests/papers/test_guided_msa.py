"""Multi-scale self-guided attention, part by part against torch's own layers, features first."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.guided_msa import GuidedMSA


def build(**config):
    torch.manual_seed(0)
    module = GuidedMSA(4, **{"widths": [4, 6], **config}).double().eval()
    with torch.no_grad():
        for step in (module.first, module.second):
            for dual in step.dual:
                dual.gammas[0].fill_(0.7)
                dual.gammas[1].fill_(-0.4)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def layer(part, x):
    norm = part.norm
    x = F.batch_norm(part.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return part.activation(x)


def layers(parts, x):
    for part in parts:
        x = layer(part, x)
    return x


def linear(part, x):
    return F.conv2d(x, part.weight[..., None, None], part.bias)


def semantic(part, u):
    first = F.max_pool2d(layers(part.down1, u), 2)
    middle = F.max_pool2d(layers(part.down2, first), 2)
    up = F.interpolate(part.wider2(layers(part.up2, middle)), first.shape[2:], mode="bilinear", align_corners=False)
    up = part.wider1(layers(part.up1, up))
    return middle, F.interpolate(up, u.shape[2:], mode="bilinear", align_corners=False)


def dual(part, u):
    p, c = (layer(one, u) for one in part.before)
    q, k, v = (linear(proj, p).flatten(2) for proj in (part.q_proj, part.k_proj, part.v_proj))
    attended = v @ torch.softmax(q.transpose(1, 2) @ k, -1).transpose(1, 2)
    flat = c.flatten(2)
    energy = flat @ flat.transpose(1, 2)
    features = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1) @ flat
    p = part.gammas[0] * attended.view_as(p) + p
    c = part.gammas[1] * features.view_as(c) + c
    return layer(part.behind[0], p) + layer(part.behind[1], c)


def step(part, joined):
    outputs, codes, again = [], [], []
    for u, one, guide, out in zip(joined, part.dual, part.guide, part.out, strict=True):
        code, decoded = semantic(part.semantic, u)
        outputs.append(linear(out, dual(one, u) * guide(decoded)))
        codes.append(code)
        again.append(decoded)
    return outputs, codes, again


def by_torch(module, maps):
    size = maps[0].shape[1:3]
    scales = [
        F.interpolate(layer(reduce, x.movedim(-1, 1)), size, mode="bilinear", align_corners=False)
        for reduce, x in zip(module.reduce, maps, strict=True)
    ]
    fused = layers(module.fuse, torch.cat(scales[::-1], 1))
    u = [torch.cat([one, fused], 1) for one in scales]
    guides, codes, again = step(module.first, u)
    u2 = [torch.cat([one, guide * fused], 1) for one, guide in zip(scales, guides, strict=True)]
    outputs, codes2, again2 = step(module.second, u2)
    losses = {
        "semantic": sum(F.mse_loss(a, b) for a, b in zip(codes, codes2, strict=True)),
        "reconstruction": sum(F.mse_loss(a, b) for a, b in zip(u + u2, again + again2, strict=True)),
    }
    return [o.movedim(1, -1) for o in outputs], losses


@pytest.mark.parametrize("size", [(8, 4), (7, 5)])
@torch.no_grad()
def test_equation_and_losses(size):
    module, maps = build(), (torch.randn(2, *size, 4).double(), torch.randn(2, 3, 2, 6).double())
    found = module(maps)
    outputs, losses = by_torch(module, maps)
    for one, other in zip(found.output, outputs, strict=True):
        torch.testing.assert_close(one, other)
    assert set(found.losses) == set(losses)
    for name, loss in losses.items():
        torch.testing.assert_close(found.losses[name], loss)


@torch.no_grad()
def test_padded_maps_give_what_smaller_ones_give_in_losses_too():
    module, maps = build(), (torch.randn(2, 5, 7, 4).double(), torch.randn(2, 3, 2, 6).double())
    masks = tuple(F.pad(torch.ones(m.shape[:3], dtype=torch.bool), (0, 3, 0, 2)) for m in maps)
    given = tuple(F.pad(m, (0, 0, 0, 3, 0, 2), value=50.0) for m in maps)
    found, wanted = module(given, mask=masks), module(maps)
    for one, other in zip(found.output, wanted.output, strict=True):
        torch.testing.assert_close(one[masks[0]], other.flatten(0, 2))
    for name, loss in wanted.losses.items():
        torch.testing.assert_close(found.losses[name], loss)


def test_refusals():
    with pytest.raises(ValueError, match=r"widths=\[\]"):
        build(widths=[])
