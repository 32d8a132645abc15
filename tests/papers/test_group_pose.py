"""Group Pose against torch's own attention, row by row and column by column."""

import pytest
import torch
from torch import nn

from manyheads.mechanisms.grid.group_pose import GroupPose


def build():
    torch.manual_seed(0)
    return GroupPose(12, 3).double()


def torchs(heads):
    """torch's layer with the same weights."""
    layer = nn.MultiheadAttention(12, 3, batch_first=True).double()
    projections = (heads.q_proj, heads.k_proj, heads.v_proj)
    layer.in_proj_weight.data = torch.cat([p.weight for p in projections])
    layer.in_proj_bias.data = torch.cat([p.bias for p in projections])
    layer.out_proj.load_state_dict(heads.o_proj.state_dict())
    return layer


@torch.no_grad()
def test_equation():
    module, x, places = build(), torch.randn(2, 3, 5, 12).double(), torch.randn(2, 3, 4, 12).double()
    within, across, h = torchs(module.within), torchs(module.across), torch.empty_like(x)
    for n in range(3):
        q = torch.cat([x[:, n, :1], x[:, n, 1:] + places[:, n]], 1)
        h[:, n] = module.norm_within(x[:, n] + within(q, q, x[:, n])[0])
    y = torch.stack(
        [module.norm_across(h[:, :, t] + across(h[:, :, t], h[:, :, t], h[:, :, t])[0]) for t in range(5)], 2
    )
    torch.testing.assert_close(module(x, places=places).output, y)


@torch.no_grad()
def test_what_reaches_whom():
    module, x = build(), torch.randn(1, 3, 5, 12).double()
    changed = x.clone()
    changed[0, 1, 2] += 1
    gap = (module(changed).output - module(x).output).abs().amax(-1)[0] > 1e-9
    assert bool(gap.all())  # within its row, and from there along every column
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(module(x[:, order]).output, module(x).output[:, order])
    other = torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(module(x[:, :, other]).output, module(x).output[:, :, other])


@torch.no_grad()
def test_a_missing_person_is_seen_by_none():
    module, x = build(), torch.randn(1, 3, 5, 12).double()
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    mask[0, 1] = False
    kept = [0, 2]
    torch.testing.assert_close(module(x, mask=mask).output[:, kept], module(x[:, kept]).output)


def test_refusals():
    x = torch.randn(2, 3, 5, 12).double()
    for wrong in (torch.zeros(2, 3, 5, 12), torch.zeros(2, 3, 4), 1.0):
        with pytest.raises(ValueError, match="places are"):
            build()(x, places=wrong)
