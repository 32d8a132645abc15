"""Attention over summaries (arXiv:2405.15633) against loops."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.tokens.token_summary import TokenSummary


def softmax(logits: list[float]) -> list[float]:
    terms = [math.exp(logit) for logit in logits]
    return [term / sum(terms) for term in terms]


def by_loops(module: TokenSummary, x: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    d, heads, dim = module.head_dim, module.heads, x.shape[1]
    gather = [softmax([float(row @ patch) / math.sqrt(dim) for patch in patches]) for row in x[1:]]
    tokens = [x[0]] + [sum(w * patch for w, patch in zip(row, patches, strict=True)) for row in gather]
    count = 0 if module.prompts is None else module.prompts.shape[2]
    mixed, matrix = torch.zeros_like(x), torch.zeros(heads, len(x), len(patches), dtype=x.dtype)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        keys = [module.prompts[0, h, p] for p in range(count)] + [module.k_proj.weight[own] @ t for t in tokens]
        values = [module.prompts[1, h, p] for p in range(count)] + [module.v_proj.weight[own] @ t for t in tokens]
        for i, token in enumerate(tokens):
            weights = softmax([float(module.q_proj.weight[own] @ token @ key) / math.sqrt(d) for key in keys])
            mixed[i, own] = sum(w * value for w, value in zip(weights, values, strict=True))
            for weight, row in zip(weights[count + 1 :], gather, strict=True):
                matrix[h, i] += weight * torch.tensor(row, dtype=x.dtype)
    return mixed @ module.o_proj.weight.T, matrix


@pytest.mark.parametrize(("prompts", "n"), [(3, 4), (0, 4), (2, 1)])
@torch.no_grad()
def test_equals_loops(prompts: int, n: int) -> None:
    module = TokenSummary(12, 3, prompts=prompts).double()
    x, patches = torch.randn(2, n, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    result = module(x, patches, mask=mask, need_weights=True)
    for row, real in enumerate((7, 4)):
        output, matrix = by_loops(module, x[row], patches[row, :real])
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row, ..., :real], matrix)


@torch.no_grad()
def test_selectors_that_each_find_their_patch_leave_plain_attention() -> None:
    """Selectors equal to large multiples of orthogonal patches sum up one patch each."""
    module, plain = TokenSummary(12, 3, prompts=0).double(), Softmax(12, 3).double()
    plain.load_state_dict(module.state_dict())
    patches = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q[None, :5]
    cls = torch.randn(1, 1, 12, dtype=torch.float64)
    found = module(torch.cat((cls, 1e3 * patches), 1), patches).output
    torch.testing.assert_close(found, plain(torch.cat((cls, patches), 1)).output)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="prompts=-1"):
        TokenSummary(12, 3, prompts=-1)
