"""LoCoNet's block against loops for the convolution and torch's encoder layer for the attention."""

import pytest
import torch
from torch import nn

from manyheads.mechanisms.convolution.loconet import LoCoNet


def build(speakers=3, frames=3):
    torch.manual_seed(0)
    module = LoCoNet(8, 2, speakers=speakers, frames=frames).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def short_by_loops(module, grid, frames=3):
    """grid [speakers, frames, 8]: each speaker's filter sees all speakers in a few frames."""
    rows, columns, dim = grid.shape
    kernel = module.conv.weight.view(dim, module.speakers, dim, module.speakers, frames)
    bias = module.conv.bias.view(dim, module.speakers)
    out = torch.zeros_like(grid)
    for speaker in range(rows):
        for t in range(columns):
            total = bias[:, speaker].clone()
            for other in range(rows):
                for tap in range(frames):
                    source = t + tap - frames // 2
                    if 0 <= source < columns:
                        total += kernel[:, speaker, :, other, tap] @ grid[other, source]
            centred = total - total.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt()
            up = module.short_up(normed * module.norm_short.weight + module.norm_short.bias)
            out[speaker, t] = grid[speaker, t] + module.short_down(up * (1 + torch.erf(up / 2**0.5)) / 2)
    return out


def encoder_layer(module):
    """torch's post-norm layer with the weights of the long-term part."""
    layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True).double().eval()
    heads = module.attention
    layer.self_attn.in_proj_weight.data = torch.cat([p.weight for p in (heads.q_proj, heads.k_proj, heads.v_proj)])
    layer.self_attn.in_proj_bias.data = torch.cat([p.bias for p in (heads.q_proj, heads.k_proj, heads.v_proj)])
    for their, mine in (
        (layer.self_attn.out_proj, heads.o_proj), (layer.linear1, module.long_up), (layer.linear2, module.long_down),
        (layer.norm1, module.norm_long), (layer.norm2, module.norm_out),
    ):  # fmt: skip
        their.load_state_dict(mine.state_dict())
    return layer


@pytest.mark.parametrize("rows", [1, 2, 3])
@torch.no_grad()
def test_equation(rows):
    module, x = build(), torch.randn(2, rows, 5, 8).double()
    long = encoder_layer(module)
    for b in range(2):
        wanted = long(short_by_loops(module, x[b]))
        torch.testing.assert_close(module(x).output[b], wanted)


@torch.no_grad()
def test_attention_stays_with_the_speaker():
    module, x = build(), torch.randn(1, 3, 5, 8).double()
    weights = module(x, need_weights=True).weights.unflatten(2, (3, 5)).unflatten(4, (3, 5))
    for first in range(3):
        for second in range(3):
            mass = weights[:, :, first, :, second].sum(-1)
            torch.testing.assert_close(mass, torch.full_like(mass, 1.0 if first == second else 0.0))


@torch.no_grad()
def test_who_hears_whom():
    """Another speaker's frame reaches all frames, through the few around it that the convolution mixes."""
    module, x = build(), torch.randn(1, 3, 9, 8).double()
    module.attention.o_proj.weight.zero_()  # without attention, only those few
    other = x.clone()
    other[:, 2, 4] += 1.0
    changed = (module(other).output - module(x).output)[0].abs().amax(-1) > 1e-9
    assert changed[0].nonzero().flatten().tolist() == [3, 4, 5]


def test_refusals():
    with pytest.raises(ValueError, match="4 rows; want at most speakers=3"):
        build()(torch.randn(1, 4, 5, 8).double())
    for config in ({"speakers": 0}, {"frames": 4}):
        with pytest.raises(ValueError, match="odd number"):
            LoCoNet(8, 2, **config)
