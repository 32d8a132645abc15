"""Routing attention (arXiv:2003.05997) against loops over clusters and tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.deferred import Deferred
from manyheads.mechanisms.selection.routing_transformer import RoutingTransformer
from manyheads.testing import check_mechanism


def norm(row: Tensor) -> Tensor:
    return (row - row.mean()) / ((row - row.mean()).square().mean() + 1e-5).sqrt()


def mix(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    if not keys:
        return torch.zeros_like(q)
    scores = [math.exp(float(q @ k) / math.sqrt(len(q))) for k in keys]
    return sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores)  # type: ignore[return-value]


def loops(module: RoutingTransformer, x: Tensor) -> Tensor:
    n, d, local = len(x), module.head_dim, module.local_heads
    q, v = ((x @ p.weight.T).split(d, -1) for p in (module.q_proj, module.v_proj))
    k = () if module.k_proj is None else (x @ module.k_proj.weight.T).split(d, -1)
    heads = []
    for h in range(local):
        near = [[j for j in range(n) if abs(i - j) < module.local_window] for i in range(n)]
        near = [[j for j in row if j <= i or not module.causal] for i, row in enumerate(near)]
        heads.append([mix(q[h][i], [k[h][j] for j in near[i]], [v[h][j] for j in near[i]]) for i in range(n)])
    for h in range(local, module.heads):
        centroids, queries = module.centroids[h - local], [norm(row) for row in q[h]]
        if module.causal:
            own = [max(range(len(centroids)), key=lambda c, t=t: float(centroids[c] @ t)) for t in queries]  # type: ignore[misc]
            seen = [[j for j in range(i + 1) if own[j] == own[i]][-module.window :] for i in range(n)]
            pairs = zip(queries, seen, strict=True)
            heads.append([mix(t, [queries[j] for j in s], [v[h][j] for j in s]) for t, s in pairs])
            continue
        keys, found = [norm(row) for row in k[h]], [[] for _ in range(n)]  # type: ignore[var-annotated]
        for centroid in centroids:
            best_q, best_k = (
                sorted(range(n), key=lambda j, r=r: -float(centroid @ r[j]))[: module.window]  # type: ignore[misc]
                for r in (queries, keys)
            )
            for i in best_q:
                found[i].append(mix(queries[i], [keys[j] for j in best_k], [v[h][j] for j in best_k]))
        heads.append([torch.stack(f).mean(0) if f else torch.zeros(d, dtype=x.dtype) for f in found])
    return torch.cat([torch.stack(rows) for rows in heads], -1) @ module.o_proj.weight.T


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("clusters", "window", "local_heads"), [(3, 5, 2), (4, 2, 0), (1, 40, 1), (2, 3, 4)])
def test_equals_loops(clusters: int, window: int, local_heads: int, causal: bool) -> None:
    module = RoutingTransformer(
        16, 4, clusters=clusters, window=window, local_heads=local_heads, local_window=4, causal=causal
    ).double()
    module.eval()
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


@pytest.mark.parametrize("local_heads", [0, 4])
def test_conformance_without_one_kind_of_head(local_heads: int) -> None:
    names = ["decode", "padding", "left-padding", "weights", "no-future", "gradients", "all-padding"]
    check_mechanism(RoutingTransformer, config={"local_heads": local_heads}, properties=names)


def test_one_cluster_of_all_tokens_is_attention_of_normed_rows() -> None:
    module = RoutingTransformer(16, 2, clusters=1, window=50, local_heads=0).double().eval()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))  # type: ignore[misc]
    q, k = (torch.nn.functional.layer_norm(t, (8,)) for t in (q, k))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module(x).output, module.o_proj(mixed.transpose(1, 2).flatten(-2)))


def test_centroids_move_in_training_only_and_not_by_padding() -> None:
    module = RoutingTransformer(8, 1, clusters=2, window=4, local_heads=0, decay=0.75).double()
    x, mask = torch.randn(2, 6, 8, dtype=torch.float64), torch.arange(6)[None] < torch.tensor([[4], [6]])
    before = module.centroids.clone()
    module.eval()(x, mask=mask)
    assert torch.equal(module.centroids, before)
    module.train()(x, mask=mask)
    torch.testing.assert_close(module.centroids, before)
    module(x[:1], mask=torch.zeros_like(mask[:1]))  # the next pass begins with what the last one moved
    rows = [norm(p(x[b, i])) for b in range(2) for p in (module.q_proj, module.k_proj) for i in range((4, 6)[b])]  # type: ignore[misc]
    for c in range(2):
        own = [r for r in rows if int((before[0] @ r).argmax()) == c]
        wanted = before[0, c] if not own else 0.75 * before[0, c] + 0.25 * torch.stack(own).mean(0)
        torch.testing.assert_close(module.centroids[0, c], wanted.detach())


@pytest.mark.parametrize("causal", [False, True])
def test_the_pass_that_moves_the_centroids_is_routed_by_those_before(causal: bool) -> None:
    """In training, later tokens and other rows must not decide who is routed where."""
    module = RoutingTransformer(8, 2, clusters=4, window=3, local_heads=0, decay=0.0, causal=causal).double()
    x, before = torch.randn(2, 30, 8, dtype=torch.float64), module.centroids.clone()
    wanted = module.eval()(x).output
    torch.testing.assert_close(module.train()(x).output, wanted)
    module(x)
    assert (module.centroids - before).abs().max() > 1e-3
    module.centroids.copy_(before)
    module.sizes.zero_()
    if causal:
        x = torch.cat([x[:, :12], 10 * torch.randn(2, 18, 8, dtype=torch.float64)], 1)
        torch.testing.assert_close(module(x).output[:, :12], wanted[:, :12])


@pytest.mark.parametrize("causal", [False, True])
def test_passes_before_one_backward_are_all_routed_alike(causal: bool) -> None:
    """Else the first could not be run again; the centroids then move by the mean of all."""
    module = RoutingTransformer(8, 2, clusters=3, window=3, local_heads=0, decay=0.5, causal=causal).double().train()
    x, before = torch.randn(4, 9, 8, dtype=torch.float64), module.centroids.clone()
    total = sum(module(part).output.sum() for part in x.split(2))
    torch.testing.assert_close(module.centroids, before)
    total.backward()
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    other.means.zero_()
    other.sizes.zero_()
    other.deferred = Deferred()
    other(x)  # all rows at once, its gradient not wanted
    for either in (module, other):
        either(x[:1])
    assert (module.centroids - before).abs().max() > 1e-3
    torch.testing.assert_close(module.centroids, other.centroids)


def test_what_was_gathered_is_saved() -> None:
    module = RoutingTransformer(8, 2, clusters=3, window=3, local_heads=0, decay=0.5).double().train()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    module(x).output.sum().backward()
    other = RoutingTransformer(8, 2, clusters=3, window=3, local_heads=0, decay=0.5).double().train()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x).output, other(x).output)
    torch.testing.assert_close(module.centroids, other.centroids)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_checkpointed_while_centroids_move(decay: float) -> None:
    check_mechanism(RoutingTransformer, config={"decay": decay, "clusters": 3}, properties=["checkpoint"])


def test_commitment_pulls_to_the_nearest_centroid() -> None:
    module = RoutingTransformer(8, 1, clusters=2, window=4, local_heads=0, causal=True).double().eval()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    rows = [norm(module.q_proj(row)).detach() for row in x[0]]
    best = [module.centroids[0][int((module.centroids[0] @ r).argmax())] for r in rows]
    wanted = sum((r - c).square().mean() for r, c in zip(rows, best, strict=True)) / 5
    torch.testing.assert_close(module(x).losses["commitment"].detach(), wanted)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="want positive sizes"):
        RoutingTransformer(16, 4, window=0)
