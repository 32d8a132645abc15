"""Tree cross attention (arXiv:2309.17388) against a recursive tree and loops over queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.tree_cross import TreeCross, tree_objective
from manyheads.testing import check_mechanism


@dataclass
class Node:
    vector: Tensor
    tokens: list[int]
    children: list[Node] = field(default_factory=list)


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def parent(module: TreeCross, children: list[Node]) -> Node:
    part, rows = module.aggregator, []
    normed = [part.attention_norm(c.vector) for c in children]
    parts = [part.qkv_proj(row).chunk(3) for row in normed]
    for i, child in enumerate(children):
        heads = []
        for h in range(module.heads):
            q, *_ = (t.chunk(module.heads)[h] for t in parts[i])
            keys, values = ([p[side].chunk(module.heads)[h] for p in parts] for side in (1, 2))
            shares = softmax([float(q @ k) / math.sqrt(len(q)) for k in keys])
            heads.append(sum(s * v for s, v in zip(shares, values, strict=True)))
        row = child.vector + part.o_proj(torch.cat(heads))
        rows.append(row + part.down_proj(torch.nn.functional.gelu(part.up_proj(part.ff_norm(row)))))
    return Node(torch.stack(rows).mean(0), [token for c in children for token in c.tokens], children)


def tree(module: TreeCross, context: Tensor) -> list[Node]:
    """The children of the root."""
    nodes = [Node(row, [i]) for i, row in enumerate(context)]
    while len(nodes) > module.branch:
        groups = [nodes[i : i + module.branch] for i in range(0, len(nodes), module.branch)]
        nodes = [parent(module, group) for group in groups]
    return nodes


def one_query(module: TreeCross, x: Tensor, top: list[Node]) -> tuple[Tensor, list[Node]]:
    q = (module.q_proj.weight @ x).chunk(module.heads)

    def scores(node: Node) -> list[float]:
        keys = (module.k_proj.weight @ node.vector).chunk(module.heads)
        return [float(a @ k) / math.sqrt(len(a)) for a, k in zip(q, keys, strict=True)]

    level, kept = top, []
    while level[0].children:
        by_head = [softmax([scores(node)[h] for node in level]) for h in range(module.heads)]
        policy = [sum(p[i] for p in by_head) for i in range(len(level))]
        best = policy.index(max(policy))
        kept += level[:best] + level[best + 1 :]
        level = level[best].children
    kept += level
    mixed = []
    for h in range(module.heads):
        shares = softmax([scores(node)[h] for node in kept])
        values = [(module.v_proj.weight @ node.vector).chunk(module.heads)[h] for node in kept]
        mixed.append(sum(s * v for s, v in zip(shares, values, strict=True)))
    return module.o_proj.weight @ torch.cat(mixed), kept


@pytest.mark.parametrize(("branch", "m"), [(2, 1), (2, 8), (2, 13), (3, 20), (4, 5)])
def test_equals_a_recursive_tree(branch: int, m: int) -> None:
    module = TreeCross(8, 2, branch=branch).double().eval()
    x, context = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, m, 8, dtype=torch.float64)
    with torch.no_grad():
        result = module(x, context, need_weights=True)
        for b in range(2):
            top = tree(module, context[b])
            for i in range(6):
                wanted, kept = one_query(module, x[b, i], top)
                torch.testing.assert_close(result.output[b, i], wanted)
                assert sorted(token for node in kept for token in node.tokens) == list(range(m))
    assert result.weights is not None
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 2, 6, dtype=torch.float64))


def test_few_tokens_are_plain_cross_attention() -> None:
    module, plain = TreeCross(16, 4, branch=6).double().eval(), Softmax(16, 4).double()
    own = module.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    x, context = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x, context).output, plain(x, context).output)


def test_training_draws_its_way_down() -> None:
    module = TreeCross(16, 4).double().train()
    x, context = torch.randn(1, 40, 16, dtype=torch.float64), torch.randn(1, 32, 16, dtype=torch.float64)
    one, other = module(x, context), module(x, context)
    assert (one.output - other.output).abs().max() > 1e-6
    mask = torch.zeros(1, 32, dtype=torch.bool)
    for m in (32, 17, 3):
        assert module(x, context[:, :m], mask=mask[:, :m]).output.eq(0).all()


def test_entropy_of_an_even_choice_is_the_logarithm_of_the_branch() -> None:
    module = TreeCross(8, 2, branch=3).double().eval()
    torch.nn.init.zeros_(module.q_proj.weight)
    loss = module(torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(1, 27, 8, dtype=torch.float64)).losses
    assert loss["entropy"].item() == pytest.approx(math.log(3), abs=1e-6)


def errors(output: Tensor) -> Tensor:
    return (output - 0.3).square().sum(-1)


@torch.no_grad()
def test_the_objective_adds_all_leaves_and_the_way_down() -> None:
    module, plain = TreeCross(8, 2).double().eval(), Softmax(8, 2).double()
    own = module.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 11, 8, dtype=torch.float64)
    mask = torch.arange(11)[None] < torch.tensor([[11], [6]])
    result, leaves = module(x, context, mask=mask), plain(x, context, mask=mask).output
    wanted = []
    for b, real in enumerate((11, 6)):
        top = tree(module, context[b, :real])
        wanted += [way(module, x[b, i], top) * float(errors(result.output[b, i])) for i in range(5)]
    wanted = sum(wanted) / 10 + errors(result.output).mean() + 0.5 * errors(leaves).mean()
    found = tree_objective(module, x, context, errors, mask=mask, leaves=0.5, bonus=0.2)
    torch.testing.assert_close(found, wanted - 0.2 * result.losses["entropy"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="mask has shape"):
        tree_objective(module, x, context, errors, mask=mask[:, :-1])


def way(module: TreeCross, x: Tensor, level: list[Node]) -> float:
    """The logarithm of the probability of the best children's path."""
    q, total = (module.q_proj.weight @ x).chunk(module.heads), 0.0
    while level[0].children:
        by_head = []
        for h in range(module.heads):
            keys = [(module.k_proj.weight @ node.vector).chunk(module.heads)[h] for node in level]
            by_head.append(softmax([float(q[h] @ k) / math.sqrt(len(k)) for k in keys]))
        policy = [sum(p[i] for p in by_head) / module.heads for i in range(len(level))]
        total += math.log(max(policy))
        level = level[policy.index(max(policy))].children
    return total


def test_its_gradient_is_that_of_the_expected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over both branches, each weighed by its probability: d/dw sum_c p_c error_c."""
    module = TreeCross(8, 2).double().train()
    x, context = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)
    nodes = module.aggregator(context.unflatten(1, (2, 2)), torch.ones(1, 2, 2, dtype=torch.bool))
    q, k = (p(t).unflatten(-1, (2, 4)).transpose(1, 2) for p, t in ((module.q_proj, x), (module.k_proj, nodes)))
    policy = (q @ k.mT / 2).softmax(-1).mean(1)[0, 0]
    weights, ours, expected = list(module.parameters()), [], 0.0
    for branch in range(2):
        monkeypatch.setattr(module, "_choose", lambda p, c=branch: torch.full_like(p[..., :1], c, dtype=torch.long))
        expected = expected + policy[branch] * errors(module(x, context).output)[0, 0]
        one = policy[branch].detach() * tree_objective(module, x, context, errors, leaves=0.0, bonus=0.0)
        ours.append(torch.autograd.grad(one, weights))
    wanted = torch.autograd.grad(expected, weights)
    for first, second, gradient in zip(*ours, wanted, strict=True):
        torch.testing.assert_close(first + second, gradient, rtol=1e-6, atol=1e-8)


def test_conformance_of_a_wider_tree() -> None:
    check_mechanism(
        TreeCross, config={"branch": 3}, properties=["padding", "decode", "gradcheck", "reorder", "weights"]
    )


def test_refuses() -> None:
    with pytest.raises(ValueError, match="branch >= 2"):
        TreeCross(16, 4, branch=1)
