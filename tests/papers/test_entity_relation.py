"""Entity-and-relation attention against loops over pairs."""

import pytest
import torch

from manyheads.mechanisms.cross import entity_relation
from manyheads.mechanisms.cross.entity_relation import EntityRelation


def build():
    torch.manual_seed(0)
    return EntityRelation(12, 3, hidden=10).double()


def read(heads, query, words):
    parts = []
    for h in range(3):
        cut = slice(4 * h, 4 * h + 4)
        scores = torch.stack([heads.q_proj(query)[cut] @ heads.k_proj(w)[cut] / 2 for w in words]).softmax(0)
        parts.append(sum(s * heads.v_proj(w)[cut] for s, w in zip(scores, words, strict=True)))
    return heads.o_proj(torch.cat(parts))


@pytest.mark.parametrize("pairs", [1 << 12, 3])
@torch.no_grad()
def test_equation(pairs, monkeypatch):
    monkeypatch.setattr(entity_relation, "PAIRS", pairs)
    module, o, w = build(), torch.randn(2, 4, 12).double(), torch.randn(2, 3, 12).double()
    real = torch.tensor([[True] * 4, [True, True, False, True]])
    found = module(o, w, objects=real).output[1]
    for a in (0, 1, 3):
        related = torch.stack([read(module.relation, o[1, a] - o[1, b], w[1]) for b in (0, 1, 3)]).amax(0)
        named = module.norm_entity(o[1, a] + read(module.entity, o[1, a], w[1]))
        x = torch.cat([named, module.norm_relation(o[1, a] + related)])
        torch.testing.assert_close(found[a], module.norm_out(named + module.down(module.up(x).relu())))


@torch.no_grad()
def test_objects_that_are_not_real_change_nothing_and_without_any_it_is_finite():
    module, o, w = build(), torch.randn(1, 4, 12).double(), torch.randn(1, 3, 12).double()
    real = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(module(o, w, objects=real).output[:, :3], module(o[:, :3], w).output)
    assert bool(module(o, w, objects=real & False).output.isfinite().all())
    assert float((module(o, w).output[:, :3] - module(o[:, :3], w).output).abs().max()) > 1e-6


def test_refusals():
    o, w = torch.randn(1, 4, 12).double(), torch.randn(1, 3, 12).double()
    for wrong in (torch.ones(1, 4), torch.ones(1, 3, dtype=torch.bool), True):
        with pytest.raises(ValueError, match="objects are"):
            build()(o, w, objects=wrong)
    with pytest.raises(ValueError, match="dense mask"):
        build()(o, w, mask=torch.ones(1, 1, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="hidden=0"):
        EntityRelation(12, 3, hidden=0)
