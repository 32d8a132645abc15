"""What must hold where edges say who sees whom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, expect, expect_close
from manyheads.testing.fed import example_edges
from manyheads.testing.properties.prop import must_raise, prop


def _is_graph(case: Case) -> bool:
    return case.pattern is Pattern.GRAPH


def _run(case: Case, module: Mechanism, x: Tensor, edges: Tensor, **call: object) -> Any:
    """With the side inputs of the example for these edges, in whatever order they stand."""
    return case.outputs(module, x, edges=edges, **call).output


@prop("permuted-nodes", "nodes in another order give the same in that order", sizes=(3, 9), when=_is_graph)
def permuted_nodes(case: Case, n: int) -> None:
    if case.cls.card.takes:
        return  # side inputs would have to be permuted as well: for the mechanism's own test
    module, x, edges = case.shared(), case.x(n), example_edges(n, case.device)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(case.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=case.device)
    wanted = _run(case, module, x, edges)
    found = _run(case, module, x[:, order], place[edges])
    expect_close(found, wanted[:, order], "nodes in another order give something else")


@prop("edges", "edges matter, their order does not, and none at all is an answer", sizes=(3, 9), when=_is_graph)
def edges(case: Case, n: int) -> None:
    module, x, edges = case.shared(), case.x(n), example_edges(n, case.device)
    wanted = _run(case, module, x, edges)
    if not case.cls.card.takes:
        expect_close(_run(case, module, x, edges.flip(1)), wanted, "edges in another order give something else")
    none = _run(case, module, x, edges[:, :0])
    expect(bool(none.isfinite().all()), "without an edge the result is not finite")
    expect(bool((none - wanted).abs().max() > 1e-9), "without any edge the result is the same")


@prop("padded-nodes", "padded nodes and their edges are as if they were not there", sizes=(3, 9), when=_is_graph)
def padded_nodes(case: Case, n: int) -> None:
    module, x, keep = case.shared(), case.x(n), n - n // 3
    mask = (torch.arange(n, device=case.device) < keep).expand(x.shape[0], n)
    dirty = torch.where(mask[..., None], x, torch.full_like(x, 50.0))
    found = _run(case, module, dirty, example_edges(n, case.device), mask=mask)[:, :keep]
    wanted = _run(case, module, x[:, :keep], example_edges(keep, case.device))
    expect_close(found, wanted, f"{keep} of {n} nodes real: differs from the graph without the others")


@prop("wrong-edges", "edges to nodes that do not exist are refused", sizes=(3,), when=_is_graph)
def wrong_edges(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    must_raise("an edge to node n", lambda: module(x, edges=torch.tensor([[0], [n]], device=case.device)))
    must_raise("an edge from node -1", lambda: module(x, edges=torch.tensor([[-1], [0]], device=case.device)))
    must_raise("edges of floats", lambda: module(x, edges=torch.zeros(2, 1, device=case.device)))
    must_raise("edges that are a list", lambda: module(x, edges=[[0], [1]]))
    must_raise("edges [e, 2]", lambda: module(x, edges=torch.zeros(3, 2, dtype=torch.int64, device=case.device)))


def _goes_along_edges(case: Case) -> bool:
    """Alone: its time is that of the edges. LargeGT, which draws any nodes in place of neighbours, does not."""
    return _is_graph(case) and case.cls.card.time == "e"


@prop(
    "lonely-nodes",
    "a node that no edge joins gets nothing from others, and with no edge none does",
    sizes=(1, 2, 5, 9),
    when=_goes_along_edges,
)
def lonely_nodes(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    edges = example_edges(n, case.device)
    for given in (edges, edges[:, :0]):
        alone = sorted(set(range(n)) - set(given.flatten().tolist()))
        output = _run(case, module, x, given)
        for node in alone[:3]:
            changed = case.x(n, seed=7)
            changed[:, node] = x[:, node]
            found = _run(case, module, changed, given)
            expect_close(found[:, node], output[:, node], f"node {node} of {n} has no edge, and changes with others")


@prop("edges-twice", "edges given twice, wherever the second stands, are an answer alike", sizes=(3, 9), when=_is_graph)
def edges_twice(case: Case, n: int) -> None:
    if case.cls.card.takes:
        return  # what goes with an edge would have to be given twice as well: for the mechanism's own test
    module, x, edges = case.shared(), case.x(n), example_edges(n, case.device)
    behind = _run(case, module, x, torch.cat([edges, edges[:, :2]], 1))
    before = _run(case, module, x, torch.cat([edges[:, :2], edges], 1))
    expect(bool(behind.isfinite().all()), "edges given twice give values that are not finite")
    expect_close(before, behind, "edges given a second time count otherwise at another place of the list")
