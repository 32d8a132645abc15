"""DARE: search with one part of the embedding and reading of the other, as loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from manyheads.mechanisms.projection.dare import DARE

close = torch.testing.assert_close


def loops(module: DARE, x: Tensor, context: Tensor) -> Tensor:
    cut, heads = module.dim - module.side_dim, module.heads
    a, r = module.side_dim // heads, cut // heads
    rows = []
    for target in x:
        history = torch.zeros(cut, dtype=x.dtype)
        for h in range(heads):
            attend, read = slice(cut + h * a, cut + (h + 1) * a), slice(h * r, (h + 1) * r)
            scores = [float(target[attend] @ item[attend]) / math.sqrt(a) for item in context]
            found = sorted(range(len(scores)), key=lambda j: -scores[j])[: module.top_k]
            total = sum(math.exp(scores[j]) for j in found)
            for j in found:
                history[read] += math.exp(scores[j]) / total * context[j, read]
        features = torch.cat([target[:cut], history, target[:cut] * history])
        rows.append(module.joint_proj.weight @ features + module.joint_proj.bias)
    return torch.stack(rows)


def _inputs(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, n, 16, dtype=torch.float64), torch.randn(1, m, 16, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 3, 50, None])
@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_equals_loops(top_k: int | None, heads: int) -> None:
    torch.manual_seed(0)
    module, (x, context) = DARE(16, heads, side_dim=6, top_k=top_k).double(), _inputs(3, 7)
    close(module(x, context).output[0], loops(module, x[0], context[0]), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_two_embeddings_are_decoupled() -> None:
    """The representation moves the result and no weight."""
    torch.manual_seed(0)
    module, (x, context) = DARE(16, 2, side_dim=6, top_k=3).double(), _inputs(3, 9)
    other = torch.cat([torch.randn(1, 9, 10, dtype=torch.float64), context[..., 10:]], -1)
    one, two = (module(x, c, need_weights=True) for c in (context, other))
    close(one.weights, two.weights, rtol=0, atol=0)
    assert float((one.output - two.output).abs().max()) > 1e-3


@torch.no_grad()
def test_the_search_passes_over_padding() -> None:
    torch.manual_seed(0)
    module, (x, context) = DARE(16, 2, side_dim=6, top_k=4).double(), _inputs(3, 9)
    mask = torch.tensor([[True, False, True, False, False, True, False, False, False]])
    result = module(x, context, mask=mask, need_weights=True)
    close(result.output, module(x, context[:, mask[0]]).output, rtol=1e-12, atol=1e-12)
    close((result.weights > 0).sum(-1), torch.full((1, 2, 3), 3))


@pytest.mark.parametrize("side_dim", [4, 48])
@torch.no_grad()
def test_without_a_search_no_matrix_is_held(side_dim: int) -> None:
    """Whichever embedding is the wider one."""
    torch.manual_seed(0)
    module, x, context = DARE(64, 2, side_dim=side_dim, top_k=None), torch.randn(1, 300, 64), torch.randn(1, 400, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        output = module(x, context).output
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 300 * 400 * 4
    close(output, module(x, context, need_weights=True).output, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="side_dim=16 of dim=16"):
        DARE(16, 2, side_dim=16)
    with pytest.raises(ValueError, match="multiples of heads=4"):
        DARE(16, 4, side_dim=6)
    with pytest.raises(ValueError, match="top_k=0"):
        DARE(16, 2, side_dim=4, top_k=0)
