"""Cross-scale attention against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.topiq import TOPIQ, cubic_weights


def build(**config):
    torch.manual_seed(0)
    module = TOPIQ(8, 2, **{"widths": [4, 6], "gate": 5, **config}).double().eval()
    with torch.no_grad():
        module.rows.normal_()
        module.columns.normal_()
    return module


@pytest.mark.parametrize("new", [1, 3, 7, 32, 50])
def test_positions_are_resized_as_torch_does(new):
    line = torch.randn(1, 1, 32, 1).double()
    wanted = F.interpolate(line.expand(-1, -1, -1, 32), (new, new), mode="bicubic", align_corners=False)[0, 0, :, 0]
    torch.testing.assert_close(cubic_weights(32, torch.tensor([new]), new)[0] @ line.flatten(), wanted)


def gate(part, x):
    h = F.gelu(part.middle(F.gelu(part.enter(x)).movedim(-1, 1)))
    return torch.sigmoid(part.leave(h)).movedim(1, -1)


def attend(heads, q, memory):
    """torch.nn.MultiheadAttention with the same weights."""
    other = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    parts = heads.q_proj, heads.k_proj, heads.v_proj
    other.load_state_dict(
        {
            "in_proj_weight": torch.cat([p.weight for p in parts]),
            "in_proj_bias": torch.cat([p.bias for p in parts]),
            "out_proj.weight": heads.o_proj.weight,
            "out_proj.bias": heads.o_proj.bias,
        }
    )
    return other(q, memory, memory)[0]


def block(part, q, memory=None):
    normed = part.norm(q)
    q = q + attend(part.attention, normed, normed if memory is None else part.norm_memory(memory))
    return q + part.down(F.gelu(part.up(part.norm_mlp(q))))


def by_torch(module, maps):
    levels, size = module.levels, maps[module.levels - 1].shape[1:3]
    table = torch.cat([module.rows[:, None].expand(-1, 32, -1), module.columns[None].expand(32, -1, -1)], -1)
    position = F.interpolate(table.movedim(-1, 0)[None], size, mode="bicubic", align_corners=False)
    tokens = []
    for i, x in enumerate(maps[:levels]):
        if module.reference:
            s = ((x - maps[i + levels]) ** 2 + 1e-12).sqrt()
            h = torch.cat([x, maps[i + levels], s], -1) * gate(module.gates[i], s)
        else:
            f, g = module.split[i](x).chunk(2, -1)
            h = F.gelu(f) * gate(module.gates[i], g)
        h = F.adaptive_avg_pool2d(h.movedim(-1, 1), size).movedim(1, -1)
        t = F.gelu(module.reduce[i](h)) + position.movedim(1, -1)
        tokens.append(block(module.blocks[i], t.flatten(1, 2)))
    q = tokens[-1]
    for part, memory in zip(module.cross, reversed(tokens[:-1]), strict=True):
        q = block(part, q, memory)
    return block(module.last, q).unflatten(1, size)


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_equation(reference):
    module = build(reference=reference, widths=[4, 6, 6])
    maps = tuple(torch.randn(2, *s, w).double() for s, w in (((7, 6), 4), ((4, 5), 6), ((2, 3), 6)) for _ in [0])
    maps = maps + tuple(torch.randn_like(m) for m in maps) if reference else maps
    torch.testing.assert_close(module(maps).output, by_torch(module, maps))


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_padded_maps_give_what_smaller_ones_give(reference):
    module = build(reference=reference)
    maps = (torch.randn(2, 5, 7, 4).double(), torch.randn(2, 2, 3, 6).double())
    maps = maps + tuple(torch.randn_like(m) for m in maps) if reference else maps
    masks = tuple(F.pad(torch.ones(m.shape[:3], dtype=torch.bool), (0, 3, 0, 2)) for m in maps)
    given = tuple(F.pad(m, (0, 0, 0, 3, 0, 2), value=50.0) for m in maps)
    torch.testing.assert_close(module(given, mask=masks).output[masks[1]], module(maps).output.flatten(0, 2))


def test_as_many_parameters_as_released():
    # Of a ResNet-50's first map, 64 features: splitconv, weight_blk and dim_reduce; and one encoder layer of 256.
    module = TOPIQ(256, 4, widths=[64])
    count = [
        sum(p.numel() for p in m.parameters())
        for m in (module.gates[0], module.split[0], module.reduce[0], module.last)
    ]
    assert count[:3] == [64 * 64 + 64 + 64 * 64 * 9 + 64 + 64 * 9 + 1, 64 * 128 + 128, 64 * 256 + 256]
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024)
    assert count[3] == sum(p.numel() for p in layer.parameters())


def test_refusals():
    with pytest.raises(ValueError, match=r"widths=\[\]"):
        build(widths=[])
    one, other = torch.zeros(1, 4, 4, 4).double(), torch.zeros(1, 2, 2, 6).double()
    with pytest.raises(ValueError, match="want them alike"):
        build(reference=True)((one, other, one[:, :3], other))
