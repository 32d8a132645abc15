"""SuperGAT against loops over nodes; its loss against the pairs it names."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.graph import supergat
from manyheads.mechanisms.graph.supergat import SuperGAT

EDGES = torch.tensor([[0, 1, 1, 2, 3, 3, 3], [1, 0, 2, 1, 2, 3, 2]])


def build(**config):
    torch.manual_seed(0)
    module = SuperGAT(12, 3, **config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def pair_logits(module, x, i, j):
    """Per head, of the edge from j into i: the logit of the loss, and the score."""
    gi, gj = ((module.proj.weight @ t).view(3, 4) for t in (x[i], x[j]))
    dots = torch.stack([a @ b for a, b in zip(gi, gj, strict=True)])
    if module.form == "sd":
        return dots / 2, dots / 2
    linear = torch.stack([module.att_l[h] @ gj[h] + module.att_r[h] @ gi[h] for h in range(3)])
    return dots, linear * dots.sigmoid()


def by_loops(module, x, edges):
    rows = []
    for i in range(len(x)):
        sources = [int(s) for s, t in edges.T.tolist() if t == i and s != i] + [i]
        scores = torch.stack([F.leaky_relu(pair_logits(module, x, i, j)[1], 0.2) for j in sources]).exp()
        weights = scores / scores.sum(0)
        values = torch.stack([(module.proj.weight @ x[j]).view(3, 4) for j in sources])
        rows.append((weights[..., None] * values).sum(0).flatten() + module.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["mx", "sd"])
@torch.no_grad()
def test_equation(form):
    module, x = build(form=form), torch.randn(2, 5, 12).double()
    torch.testing.assert_close(module(x, edges=EDGES).output[1], by_loops(module, x[1], EDGES))


@torch.no_grad()
def test_a_node_without_edges_keeps_itself():
    module, x = build(), torch.randn(1, 5, 12).double()
    torch.testing.assert_close(module(x, edges=EDGES).output[0, 4], module.proj(x)[0, 4] + module.bias)


@pytest.mark.parametrize("form", ["mx", "sd"])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_edges_against_drawn_pairs(form):
    module, x = build(form=form, negatives=0.5).train(), torch.randn(2, 5, 12).double()
    real = torch.tensor([[True] * 5, [True] * 4 + [False]])
    torch.manual_seed(4)
    found = module(x, edges=EDGES, mask=real).losses["edge"]
    torch.manual_seed(4)
    torch.rand(11)
    drawn, valid = supergat._no_edges(supergat.with_loops(EDGES, 5), 5, 5)
    pairs = [(s, t, 1.0) for s, t in supergat.with_loops(EDGES, 5).T.tolist()]
    pairs += [(s, t, 0.0) for s, t in drawn[:, valid].T.tolist()]
    assert len(pairs) == 11 + int(valid.sum())
    costs = [
        F.binary_cross_entropy_with_logits(pair_logits(module, x[b], t, s)[0].mean(), torch.tensor(y).double())
        for b in range(2)
        for s, t, y in pairs
        if real[b, s] and real[b, t]
    ]
    torch.testing.assert_close(found, torch.stack(costs).mean())


def test_drawn_pairs_are_no_edges_and_a_full_graph_has_none():
    edges = supergat.with_loops(EDGES, 5)
    drawn, valid = supergat._no_edges(edges, 5, 40)
    assert int(valid.sum()) == 40
    assert not set(map(tuple, drawn[:, valid].T.tolist())) & set(map(tuple, edges.T.tolist()))
    full = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    assert not supergat._no_edges(full, 3, 9)[1].any()
    loss = build().train()(torch.randn(1, 3, 12).double(), edges=full).losses["edge"]
    assert bool(loss.isfinite())


def test_the_loss_teaches_edges():
    module, x = build(form="sd").train(), torch.randn(1, 5, 12).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    costs = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(x, edges=EDGES).losses["edge"]
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    assert sum(costs[-10:]) < 0.6 * sum(costs[:10])


def test_parameters():
    # As torch_geometric counts SuperGATConv(64, 16, heads=4): 64 x 64, two vectors of 64, a bias.
    assert sum(p.numel() for p in SuperGAT(64, 4).parameters()) == 64 * 64 + 2 * 64 + 64


def test_refusals():
    for wrong in ({"form": "go"}, {"negatives": -1.0}, {"sampled": 0.0}):
        with pytest.raises(ValueError, match="supergat: form"):
            build(**wrong)
