"""DARE: search with one part of the embedding and reading of the other, as loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from manyheads.mechanisms.projection.dare import DARE

close = torch.testing.assert_close


def loops(module: DARE, x: Tensor, context: Tensor, search: Tensor, context_search: Tensor) -> Tensor:
    heads = module.heads
    a, r = module.side_dim // heads, module.dim // heads
    rows = []
    for target, asked in zip(x, search, strict=True):
        history = torch.zeros_like(target)
        for h in range(heads):
            attend, read = slice(h * a, (h + 1) * a), slice(h * r, (h + 1) * r)
            scores = [float(asked[attend] @ item[attend]) / math.sqrt(a) for item in context_search]
            found = sorted(range(len(scores)), key=lambda j: -scores[j])[: module.top_k]
            total = sum(math.exp(scores[j]) for j in found)
            for j in found:
                history[read] += math.exp(scores[j]) / total * context[j, read]
        features = torch.cat([target, history, target * history])
        rows.append(module.joint_proj.weight @ features + module.joint_proj.bias)
    return torch.stack(rows)


def _inputs(n: int, m: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x, context, search, other = (torch.randn(1, k, w, dtype=torch.float64) for w in (10, 6) for k in (n, m))
    return x, context, {"search": search, "context_search": other}


@pytest.mark.parametrize("top_k", [1, 3, 50, None])
@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_equals_loops(top_k: int | None, heads: int) -> None:
    torch.manual_seed(0)
    module, (x, context, more) = DARE(10, heads, side_dim=6, top_k=top_k).double(), _inputs(3, 7)
    wanted = loops(module, x[0], context[0], more["search"][0], more["context_search"][0])
    close(module(x, context, **more).output[0], wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_two_embeddings_are_decoupled() -> None:
    """The representation moves the result and no weight."""
    torch.manual_seed(0)
    module, (x, context, more) = DARE(10, 2, side_dim=6, top_k=3).double(), _inputs(3, 9)
    other = torch.randn(1, 9, 10, dtype=torch.float64)
    one, two = (module(x, c, need_weights=True, **more) for c in (context, other))
    close(one.weights, two.weights, rtol=0, atol=0)
    assert float((one.output - two.output).abs().max()) > 1e-3


@torch.no_grad()
def test_the_search_passes_over_padding() -> None:
    torch.manual_seed(0)
    module, (x, context, more) = DARE(10, 2, side_dim=6, top_k=4).double(), _inputs(3, 9)
    mask = torch.tensor([[True, False, True, False, False, True, False, False, False]])
    result = module(x, context, mask=mask, need_weights=True, **more)
    left = {**more, "context_search": more["context_search"][:, mask[0]]}
    close(result.output, module(x, context[:, mask[0]], **left).output, rtol=1e-12, atol=1e-12)
    close((result.weights > 0).sum(-1), torch.full((1, 2, 3), 3))


@pytest.mark.parametrize("side_dim", [4, 48])
@torch.no_grad()
def test_without_a_search_no_matrix_is_held(side_dim: int) -> None:
    """Whichever embedding is the wider one."""
    torch.manual_seed(0)
    module = DARE(24, 2, side_dim=side_dim, top_k=None)
    x, context = torch.randn(1, 300, 24), torch.randn(1, 400, 24)
    more = {"search": torch.randn(1, 300, side_dim), "context_search": torch.randn(1, 400, side_dim)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        output = module(x, context, **more).output
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 300 * 400 * 4
    close(output, module(x, context, need_weights=True, **more).output, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    module, (x, context, more) = DARE(10, 2, side_dim=6).double(), _inputs(3, 9)
    with pytest.raises(ValueError, match=r"context_search is \[1, 3, 6\] on cpu; want \[1, 9, 6\]"):
        module(x, context, search=more["search"], context_search=more["search"])
    with pytest.raises(ValueError, match=r"\['context_search'\] missing"):
        module(x, context, search=more["search"])
    with pytest.raises(ValueError, match="multiples of heads=4"):
        DARE(16, 4, side_dim=6)
    with pytest.raises(ValueError, match="top_k=0"):
        DARE(16, 2, side_dim=4, top_k=0)
