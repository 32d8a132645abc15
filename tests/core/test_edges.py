"""Attention along edges against dense matrices; memory and time in edges."""

import time

import pytest
import torch

from manyheads.functional import edges as along


def some_edges(nodes=7, count=30, seed=0):
    return torch.randint(nodes, (2, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [4, 1 << 16])
def test_dot_and_mix_and_their_gradients_are_those_of_gathers(block, monkeypatch):
    monkeypatch.setattr(along, "CPU_BLOCK", block)
    edges = some_edges()
    q, k = (torch.randn(2, 7, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = along.edge_dot(q, k, edges)
    torch.testing.assert_close(found, (q[:, edges[1]] * k[:, edges[0]]).sum(-1))
    mixed = along.edge_mix(found, k, edges, 7)
    wanted = torch.zeros_like(mixed).index_add(1, edges[1], found[..., None] * k[:, edges[0]])
    torch.testing.assert_close(mixed, wanted)
    torch.autograd.gradcheck(lambda a, b: along.edge_mix(along.edge_dot(a, b, edges), b, edges, 7), (q, k))
    torch.autograd.gradgradcheck(lambda a, b: along.edge_dot(a, b, edges), (q, k), fast_mode=True)


def test_softmax_is_that_of_dense_rows_with_edges_given_twice():
    edges, scores = some_edges(), 30 * torch.randn(2, 30, 3, dtype=torch.float64)
    allowed = torch.rand(2, 30) < 0.7
    allowed[0, edges[1] == 2] = False
    found = along.edge_softmax(scores, edges[1], 7, allowed)
    for b in range(2):
        for node in range(7):
            here = (edges[1] == node) & allowed[b]
            torch.testing.assert_close(found[b, here], scores[b, here].softmax(0))
    assert bool((found[~allowed] == 0).all())


def test_no_edges_and_lone_nodes_give_zeros_and_no_nan_gradient():
    x = torch.randn(1, 3, 1, 2, requires_grad=True)
    for edges in (torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[0], [1]])):
        allowed = torch.zeros(1, edges.shape[1], dtype=torch.bool)
        weights = along.edge_softmax(along.edge_dot(x, x, edges), edges[1], 3, allowed)
        mixed = along.edge_mix(weights, x, edges, 3)
        assert bool((mixed == 0).all())
        (gradient,) = torch.autograd.grad(mixed.sum() + weights.sum(), x)
        assert bool((gradient == 0).all())


def test_the_matrix_adds_up_edges_given_twice():
    edges = torch.tensor([[0, 0, 1], [1, 1, 0]])
    matrix = along.dense_weights(torch.tensor([[[0.25], [0.5], [1.0]]]), edges, 2)
    torch.testing.assert_close(matrix, torch.tensor([[[[0.0, 1.0], [0.75, 0.0]]]]))


def test_loops_are_one_for_each_node():
    edges = along.with_loops(torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]), 3)
    assert edges.tolist() == [[1, 0, 1, 2], [0, 0, 1, 2]]


def test_what_a_graph_keeps_for_backward_does_not_grow_with_edges_times_features():
    edges, x = some_edges(10, 1000), torch.randn(1, 10, 2, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        weights = along.edge_softmax(along.edge_dot(x, x, edges), edges[1], 10)
        along.edge_mix(weights, x, edges, 10)
    assert max(kept) <= 2 * 1000


def test_sampling_keeps_few_of_each_target_and_is_even_and_the_same_again():
    edges = some_edges(5, 200)
    kept = along.sample_edges(edges, 3, seed=1)
    assert torch.equal(kept, along.sample_edges(edges, 3, seed=1))
    assert torch.bincount(kept[1], minlength=5).tolist() == [3] * 5
    assert torch.equal(along.sample_edges(edges, 200, seed=0), edges)
    times = torch.zeros(20)
    fan = torch.stack([torch.arange(20), torch.zeros(20, dtype=torch.int64)])
    for seed in range(400):
        times[along.sample_edges(fan, 5, seed)[0]] += 1
    assert bool(((times - 100).abs() < 45).all())
    with pytest.raises(ValueError, match="count=0"):
        along.sample_edges(edges, 0, seed=0)


def test_a_million_edges_are_sampled_in_seconds():
    edges = some_edges(100_000, 1_000_000)
    start = time.perf_counter()
    kept = along.sample_edges(edges, 5, seed=0)
    assert time.perf_counter() - start < 10
    assert int(torch.bincount(kept[1]).max()) == 5
