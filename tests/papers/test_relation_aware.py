"""Relation-aware graph attention against loops over edges, and on a complete graph against Shaw's sequences."""

import pytest
import torch

from manyheads.mechanisms.graph.relation_aware import RelationAware
from manyheads.mechanisms.position.shaw import Shaw

EDGES = torch.tensor([[0, 1, 1, 2, 3, 3, 3], [1, 0, 2, 1, 2, 3, 2]])
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 1])


def build(**config):
    torch.manual_seed(0)
    return RelationAware(12, 3, labels=3, **config).double().eval()


def by_loops(module, x):
    q, k, v = ((p.weight @ x.T).T.unflatten(-1, (3, 4)) for p in (module.q_proj, module.k_proj, module.v_proj))
    rows = torch.zeros(len(x), 3, 4).double()
    for i in range(len(x)):
        into = [(int(s), int(label)) for s, t, label in zip(*EDGES, LABELS, strict=True) if t == i]
        for h in range(3):
            if into:
                keys = [k[j, h] + module.key_table[label] for j, label in into]
                weights = torch.stack([q[i, h] @ key / 2 for key in keys]).softmax(0)
                values = [v[j, h] + module.value_table[label] for j, label in into]
                rows[i, h] = sum(w * value for w, value in zip(weights, values, strict=True))
    return rows.flatten(1) @ module.o_proj.weight.T


@torch.no_grad()
def test_equation():
    module, x = build(), torch.randn(2, 5, 12).double()
    found = module(x, edges=EDGES, labels=LABELS).output
    torch.testing.assert_close(found[1], by_loops(module, x[1]))
    assert bool((found[:, 4] == 0).all())
    order = torch.tensor([3, 1, 0, 6, 5, 4, 2])
    torch.testing.assert_close(module(x, edges=EDGES[:, order], labels=LABELS[order]).output, found)


@torch.no_grad()
def test_on_a_complete_graph_with_clipped_distances_it_is_shaw():
    torch.manual_seed(0)
    shaw, x = Shaw(12, 3, max_distance=2).double(), torch.randn(2, 6, 12).double()
    module = RelationAware(12, 3, labels=5).double()
    module.load_state_dict(shaw.state_dict())
    edges = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    labels = (edges[0] - edges[1]).clamp(-2, 2) + 2
    result, wanted = module(x, edges=edges, labels=labels, need_weights=True), shaw(x, need_weights=True)
    torch.testing.assert_close(result.output, wanted.output)
    torch.testing.assert_close(result.weights, wanted.weights)


def test_refusals():
    module, x = build(), torch.randn(1, 5, 12).double()
    for wrong in (LABELS + 1, LABELS - 1, LABELS.float(), LABELS[:-1], [0] * 7):
        with pytest.raises(ValueError, match="relation-aware: labels"):
            module(x, edges=EDGES, labels=wrong)
    with pytest.raises(ValueError, match="labels=0"):
        RelationAware(12, 3, labels=0)
