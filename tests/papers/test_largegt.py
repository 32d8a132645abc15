"""LargeGT against loops over nodes; its codebook against k-means by hand; its sampling against lists."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.functional import edges as along
from manyheads.mechanisms.graph.largegt import LargeGT

EDGES = torch.tensor([[0, 1, 1, 2, 3, 3, 3], [1, 0, 2, 1, 2, 3, 2]])


def build(**config):
    torch.manual_seed(0)
    return LargeGT(4, 2, nodes=5, centroids=3, global_dim=2, **config).double()


def given(n=5):
    sampled = torch.tensor([[0, 1, 2], [1, 0, 0], [2, 3, 1], [3, 3, 2], [4, 0, 3]])[:n]
    return {"edges": EDGES, "sampled": sampled, "encoding": torch.linspace(-1, 1, 10).view(5, 2).double()[:n]}


def by_loops(module, x):
    matrix = torch.eye(5).double()
    for s, t in EDGES.T.tolist():
        matrix[t, s] += 1
    matrix = matrix / matrix.sum(1).sqrt()[:, None] / matrix.sum(0).sqrt()
    hops, inputs, rows = [x, matrix @ x, matrix @ matrix @ x], given(), []
    book = module.codebook * (module.variance + 1e-5).sqrt() + module.mean
    for i in range(5):
        t = module.local_in(torch.stack([hops[hop][j] for j in inputs["sampled"][i] for hop in range(3)]))
        normed, heads = module.norm(t), []
        for h in range(2):
            cut = slice(4 * h, 4 * h + 4)
            q, k, v = (p(normed)[:, cut] for p in (module.q_proj, module.k_proj, module.v_proj))
            heads.append((q @ k.T / 2).softmax(-1) @ v)
        out = module.norm_out(module.residual(t) + module.o_proj(torch.cat(heads, -1)))
        scores = module.readout(out[1:])
        local = out[0] + (scores.softmax(0) * out[1:]).sum(0)
        q, parts = module.q_g(torch.cat([module.proj_g(x[i]), inputs["encoding"][i]])), []
        for h in range(2):
            cut, scores = slice(4 * h, 4 * h + 4), []
            for c in range(3):
                count = int((module.assigned == c).sum())
                scores.append((q[cut] @ module.k_g(book[c])[cut] / 2).exp() * count)
            parts.append(sum(s / sum(scores) * module.v_g(e[:2])[cut] for s, e in zip(scores, book, strict=True)))
        rows.append(F.relu(module.down(F.relu(module.up(torch.cat([local, *parts]))))))
    return torch.stack(rows)


@torch.no_grad()
def test_equation():
    module, x = build().eval(), torch.randn(2, 5, 4).double()
    module.assigned.copy_(torch.tensor([0, 2, 2, 2, 0]))  # a centroid of no node is never attended to
    module.mean.normal_()
    torch.testing.assert_close(module(x, **given()).output[1], by_loops(module, x[1]))


def test_k_means_moves_once_by_all_passes_before_a_backward():
    module, x = build().train(), torch.randn(3, 1, 5, 4).double()
    book, sums = module.codebook.clone(), module.sums.clone()
    real = torch.tensor([[True] * 4 + [False]])
    total = sum(module(x[i], **given(), mask=real).output.sum() for i in range(2))
    torch.testing.assert_close(module.codebook, book)
    total.backward()
    module(x[2], **given())
    sizes, moments, assigned = torch.zeros(3).double(), [], None
    for i in range(2):
        rows = torch.cat([module.proj_g(x[i, 0]), given()["encoding"]], -1)[:4].detach()
        normed = F.batch_norm(rows, None, None, training=True)
        moments.append((rows.mean(0), rows.var(0)))
        assigned = (normed[:, None] - book).square().sum(-1).argmin(-1)
        sizes += 0.01 * F.one_hot(assigned, 3).sum(0)
        sums = sums + 0.01 * torch.stack([normed[assigned == c].sum(0) for c in range(3)])
    sizes = 0.99 + sizes
    sizes = (sizes + 1e-5) / (sizes.sum() + 3e-5) * sizes.sum()
    # What was held before decays once; the sums above hold it undecayed.
    torch.testing.assert_close(module.codebook, (sums - 0.01 * book) / sizes[:, None])
    torch.testing.assert_close(module.mean, 0.1 * (moments[0][0] + moments[1][0]) / 2)
    torch.testing.assert_close(module.variance, 0.9 + 0.1 * (moments[0][1] + moments[1][1]) / 2)
    assert module.assigned[:4].tolist() == assigned.tolist()


def test_sampling_is_from_one_and_two_hops():
    picked = along.sample_two_hops(EDGES, 6, 40, seed=0)
    into = {t: {s for s, end in EDGES.T.tolist() if end == t} for t in range(6)}
    for node in range(6):
        two = {far for near in into[node] for far in into[near]}
        assert picked[node, 0] == node
        assert set(picked[node, 1:].tolist()) == (into[node] | two or set(range(6)))
    assert torch.equal(picked, along.sample_two_hops(EDGES, 6, 40, seed=0))
    # Node 2 has 1 and 3 one edge away, 0, 2 and 3 two: 3 stands twice among five.
    assert [int(c) // 7 for c in torch.bincount(picked[2, 1:])] == [1, 1, 1, 2]


def test_sampling_is_even():
    times = torch.zeros(21)
    star = torch.stack([torch.arange(1, 21), torch.zeros(20, dtype=torch.int64)])
    for seed in range(400):
        around = along.sample_two_hops(star, 21, 6, seed)[0, 1:]
        assert len(around.unique()) == 5
        times[around] += 1
    assert bool(((times[1:] - 100).abs() < 45).all())


def test_sampling_in_blocks_is_the_same_choice_of_nodes(monkeypatch):
    torch.manual_seed(0)
    edges = torch.cat([torch.randint(100, (2, 500)), torch.arange(100).expand(2, -1)], 1)
    whole = along.sample_two_hops(edges, 100, 200, seed=0)
    monkeypatch.setattr(along, "BLOCK_WAYS", 100)
    parts = along.sample_two_hops(edges, 100, 200, seed=0)
    for one, other in zip(whole, parts, strict=True):
        assert set(one.tolist()) == set(other.tolist())
    few = along.sample_two_hops(edges, 100, 5, seed=0)
    for node in range(100):
        assert set(few[node].tolist()) <= set(whole[node].tolist())


def test_refusals():
    module, x = build(), torch.randn(1, 5, 4).double()
    shifted = given()["sampled"].roll(1, 0)
    for wrong, words in [
        ({"sampled": shifted}, "itself"),
        ({"sampled": given()["sampled"] + 5}, "names nodes"),
        ({"sampled": given()["sampled"][:4]}, "sampled is"),
        ({"encoding": torch.zeros(5, 3).double()}, "encoding is"),
        ({"ids": torch.arange(5) + 1}, "ids names"),
    ]:
        with pytest.raises(ValueError, match=words):
            module(x, **{**given(), **wrong})
    with pytest.raises(ValueError, match="want 0 to 4"):
        build()(torch.randn(1, 6, 4).double(), edges=EDGES, sampled=torch.arange(6)[:, None], encoding=torch.ones(6, 2))
    with pytest.raises(ValueError, match="decay=2"):
        build(decay=2.0)
