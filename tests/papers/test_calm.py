"""CALM's composition against loops."""

import pytest
import torch

from manyheads.mechanisms.cross.calm import Calm


def build(**config):
    torch.manual_seed(0)
    return Calm(12, 3, **config).double().eval()


def by_loops(module, x, context, seen):
    rows = []
    projected = [module.proj.weight @ row for row in context]
    for i, row in enumerate(x):
        mixed = torch.zeros(12, dtype=x.dtype)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q = module.q_proj.weight[part] @ row
            scores = [(q @ (module.k_proj.weight[part] @ p) / 2).exp() for p in projected[: seen(i)]]
            for p, score in zip(projected, scores, strict=False):
                mixed[part] += score / sum(scores) * (module.v_proj.weight[part] @ p)
        rows.append(module.o_proj.weight @ mixed)
    return torch.stack(rows)


@pytest.mark.parametrize("source_dim", [None, 12, 5, 20])
@torch.no_grad()
def test_equation(source_dim):
    module, x = build(source_dim=source_dim), torch.randn(2, 4, 12).double()
    context = torch.randn(2, 6, module.source_dim).double()
    torch.testing.assert_close(module(x, context).output[1], by_loops(module, x[1], context[1], lambda i: 6))


@torch.no_grad()
def test_two_models_on_the_same_text_with_a_triangular_mask():
    module, x, context = build(source_dim=8), torch.randn(2, 5, 12).double(), torch.randn(2, 5, 8).double()
    past = torch.ones(5, 5).tril().bool().expand(2, 1, -1, -1)
    found = module(x, context, mask=past).output
    torch.testing.assert_close(found[1], by_loops(module, x[1], context[1], lambda i: i + 1))
    later = context.clone()
    later[:, 3:] = 7.0
    torch.testing.assert_close(module(x, later, mask=past).output[:, :3], found[:, :3])


def test_refusals():
    with pytest.raises(ValueError, match="source_dim=0"):
        build(source_dim=0)
    with pytest.raises(ValueError, match=r"context has shape \(1, 6, 12\); want \[1, m >= 1, 5\]"):
        build(source_dim=5)(torch.randn(1, 4, 12).double(), torch.randn(1, 6, 12).double())
