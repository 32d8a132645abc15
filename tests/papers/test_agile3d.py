"""Click attention against torch's own layers, scene by scene."""

import pytest
import torch
from torch import nn

from manyheads.mechanisms.cross.agile3d import Agile3D, object_logits


def build():
    torch.manual_seed(0)
    return Agile3D(12, 3, hidden=20).double()


def torchs(heads):
    layer = nn.MultiheadAttention(12, 3, batch_first=True).double()
    projections = (heads.q_proj, heads.k_proj, heads.v_proj)
    layer.in_proj_weight.data = torch.cat([p.weight for p in projections])
    layer.in_proj_bias.data = torch.cat([p.bias for p in projections])
    layer.out_proj.load_state_dict(heads.o_proj.state_dict())
    return layer


def by_torch(m, q, s, pq, ps, blocked):
    q = m.norm_scene(q + torchs(m.to_scene)(q + pq, s + ps, s, attn_mask=blocked)[0])
    q = m.norm_between(q + torchs(m.between)(q + pq, q + pq, q)[0])
    q = m.norm_up(q + m.down(m.up(q).relu()))
    return q, m.norm_clicks(s + torchs(m.to_clicks)(s + ps, q + pq, q)[0])


@torch.no_grad()
def test_equation():
    m, clicks, points = build(), torch.randn(2, 1, 4, 12).double(), torch.randn(2, 2, 3, 12).double()
    pq, ps = torch.randn_like(clicks), torch.randn_like(points)
    objects = torch.tensor([[[0, 1, 1, 2]], [[1, 0, 3, 0]]])
    seen = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [1, 1, 1]]])
    found = m((clicks, points), objects=objects, seen=seen, places=pq, seen_from=ps).output
    first = m((clicks, points), places=pq, seen_from=ps).output
    for b in range(2):
        blocked = objects[b].view(-1, 1) != seen[b].view(1, -1)
        blocked[blocked.all(1)] = False
        given = [t[b].view(-1, 12) for t in (clicks, points, pq, ps)]
        for output, mask in ((found, blocked), (first, None)):
            q, s = by_torch(m, *given, mask)
            torch.testing.assert_close(output[0][b].view(-1, 12), q)
            torch.testing.assert_close(output[1][b].view(-1, 12), s)


@torch.no_grad()
def test_padded_clicks_and_points_are_seen_by_none():
    m, clicks, points = build(), torch.randn(1, 1, 4, 12).double(), torch.randn(1, 1, 6, 12).double()
    objects, seen = torch.tensor([[[0, 1, 2, 1]]]), torch.tensor([[[0, 1, 1, 0, 2, 2]]])
    masks = torch.tensor([[[True] * 3 + [False]]]), torch.tensor([[[True] * 4 + [False] * 2]])
    padded = m((clicks, points), objects=objects, seen=seen, mask=masks).output
    cut = m((clicks[:, :, :3], points[:, :, :4]), objects=objects[..., :3], seen=seen[..., :4]).output
    torch.testing.assert_close(padded[0][:, :, :3], cut[0])  # of object 2 no real point was seen: all real ones
    torch.testing.assert_close(padded[1][:, :, :4], cut[1])


def test_objects_are_the_largest_of_their_clicks():
    points, clicks = torch.randn(1, 5, 4), torch.randn(1, 3, 4)
    logits = object_logits(points, clicks, torch.tensor([[1, 0, 1]]), 3)
    products = points[0] @ clicks[0].T
    torch.testing.assert_close(logits[0, :, 0], products[:, 1])
    torch.testing.assert_close(logits[0, :, 1], products[:, [0, 2]].amax(1))
    assert bool((logits[0, :, 2] == -torch.inf).all())
    with pytest.raises(ValueError, match="below count=1"):
        object_logits(points, clicks, torch.tensor([[1, 0, 1]]), 1)


def test_refusals():
    x = torch.randn(1, 1, 4, 12).double(), torch.randn(1, 1, 6, 12).double()
    objects = torch.zeros(1, 1, 4).long()
    for wrong, words in [
        ({"objects": objects}, "both or none"),
        ({"objects": objects[..., :3], "seen": objects}, "objects is"),
        ({"objects": objects, "seen": torch.zeros(1, 1, 6)}, "seen is"),
        ({"places": torch.zeros(1, 1, 4)}, "places is"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()(x, **wrong)
    with pytest.raises(ValueError, match="hidden=0"):
        Agile3D(12, 3, hidden=0)
