"""Multi-Token Attention: its convolutions as loops, the identity it starts from, and what its state must remember."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.scoring.multi_token import MultiToken

close = torch.testing.assert_close
BOTH = {"query_kernel": 3, "key_kernel": 5, "post_query_kernel": 2, "post_key_kernel": 3}


def convolve(matrix: Tensor, kernel: Tensor) -> Tensor:
    """out[i, j] = sum of kernel[a, b] matrix[i + a - (c_q - 1), j + b - c_k // 2], zero outside of the matrix."""
    rows, columns = kernel.shape
    out = torch.zeros_like(matrix)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            for a in range(rows):
                for b in range(columns):
                    y, x = i + a - (rows - 1), j + b - columns // 2
                    if 0 <= y < matrix.shape[0] and 0 <= x < matrix.shape[1]:
                        out[i, j] += kernel[a, b] * matrix[y, x]
    return out


def row_softmax(matrix: Tensor, causal: bool) -> Tensor:
    out = torch.zeros_like(matrix)
    for i in range(len(matrix)):
        seen = i + 1 if causal else matrix.shape[1]
        powers = [math.exp(float(s)) for s in matrix[i, :seen]]
        out[i, :seen] = torch.tensor(powers, dtype=matrix.dtype) / sum(powers)
    return out


def loops(module: MultiToken, x: Tensor, causal: bool) -> Tensor:
    """One sequence x [n, dim]."""
    d, n = module.head_dim, len(x)
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    past = torch.ones(n, n, dtype=x.dtype).tril() if causal else torch.ones(n, n, dtype=x.dtype)
    heads = []
    for head in range(module.heads):
        part = slice(head * d, (head + 1) * d)
        pairs = [[float(q[i, part] @ k[j, part]) / math.sqrt(d) for j in range(n)] for i in range(n)]
        scores = torch.tensor(pairs, dtype=x.dtype) * past
        weights = row_softmax(convolve(scores, module.kernel[head, 0]), causal)
        if module.post_kernel is not None:
            weights = convolve(weights, module.post_kernel[head, 0]) * past
        heads.append(weights)
    groups, size, _ = module.head_mixing.shape
    mixed = torch.zeros_like(q)
    for group in range(groups):
        for c in range(size):
            weights = sum(heads[group * size + a] * module.head_mixing[group, a, c] for a in range(size))
            part = slice((group * size + c) * d, (group * size + c + 1) * d)
            rows = weights @ v[:, part]
            for i in range(n):
                row = rows[i] / math.sqrt(float((rows[i] ** 2).mean()) + 1e-5) * module.norm.weight * module.keep
                if module.gate is not None:
                    row = row / (1 + math.exp(-float(module.gate.weight[0] @ row + module.gate.bias[0])))
                mixed[i, part] = row
    return mixed @ module.o_proj.weight.T


def _module(causal: bool = True, **settings: Any) -> MultiToken:
    torch.manual_seed(0)
    module = MultiToken(16, 4, causal=causal, **settings).double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "proj" not in name:
                weight.add_(0.5 * torch.randn(weight.shape))
    return module


def _x(n: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, n, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {"query_kernel": 3, "key_kernel": 5},
        {"query_kernel": 1, "key_kernel": 3, "head_kernel": 1},
        {**BOTH, "head_kernel": 4, "gate": True, "lambda_init": 0.2},
        {**BOTH, "query_kernel": 1, "post_query_kernel": 4},
        {},
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, settings: dict[str, Any]) -> None:
    module, x = _module(causal, **settings), _x(7)
    close(module(x).output[0], loops(module, x[0], causal), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_starts_as_softmax_with_normed_heads(causal: bool) -> None:
    torch.manual_seed(1)
    module, plain = MultiToken(16, 4, causal=causal, **BOTH).double(), Softmax(16, 4, causal=causal).double()
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if "_proj" in n})
    x = _x(9, 2)
    weights = plain(x, need_weights=True).weights
    close(module(x, need_weights=True).weights, weights, rtol=1e-12, atol=1e-12)
    mixed = weights @ plain.v_proj(x).unflatten(-1, (4, 4)).transpose(1, 2)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(module(x).output, plain.o_proj(mixed.transpose(1, 2).flatten(-2)), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_kernel_can_read_the_query_before() -> None:
    """With its weight on the row before, query i weighs keys as query i - 1 does, its own key counting as zero."""
    module, x = MultiToken(16, 4, causal=True, query_kernel=2, key_kernel=1, head_kernel=1).double(), _x(6)
    module.kernel.copy_(torch.tensor([1.0, 0.0])[None, None, :, None])
    weights = module(x, need_weights=True).weights
    q, k = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    scores = torch.cat([(q @ k.transpose(-1, -2) / 2)[:, :, 3, :4], torch.zeros(1, 4, 1, dtype=torch.float64)], -1)
    close(weights[:, :, 4, :5], scores.softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, BOTH, {"query_kernel": 1, "key_kernel": 1}])
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [2, 10]])
@torch.no_grad()
def test_decoding_remembers_queries(chunks: list[int], settings: dict[str, Any]) -> None:
    """With padding that only a later pass has, and rotary embedding."""
    module, x = _module(rotary={"base": 100.0}, **settings), _x(12, 2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, -2:] = False
    wanted = module(x, mask=mask).output
    state, parts, start = module.init_state(2), [], 0
    for size in chunks:
        part = slice(start, start + size)
        given = None if bool(mask[:, part].all()) else mask[:, part]
        parts.append(module(x[:, part], mask=given, state=state).output)
        start += size
    close(torch.cat(parts, 1), wanted, rtol=1e-11, atol=1e-11)
    assert len(state.grown["keys"]) == 12


@torch.no_grad()
def test_padded_queries_count_as_zero() -> None:
    """Without causality a padded query would meet real keys, and its row would reach the next queries' convolutions."""
    module, x = _module(False, **BOTH), _x(8)
    mask = torch.arange(8)[None] >= 3
    close(module(x, mask=mask).output[:, 3:], module(x[:, 3:]).output, rtol=1e-11, atol=1e-11)
    inside = torch.tensor([[True, True, False, False, True, True, True, True]])
    other = torch.where(inside[..., None], x, 50.0)
    close(module(other, mask=inside).output[inside], module(x, mask=inside).output[inside], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_state_holds_a_constant_number_of_queries() -> None:
    module, x = _module(**BOTH), _x(9)
    state = module.init_state(1)
    for i in range(9):
        module(x[:, i : i + 1], state=state)
        held = state.fixed["queries"]
        assert held.shape == (1, 4, 3, 4)
        assert held.untyped_storage().nbytes() == held.numel() * 8


def test_refusals() -> None:
    with pytest.raises(ValueError, match="head_kernel=3 does not divide heads=4"):
        MultiToken(16, 4, head_kernel=3)
    with pytest.raises(ValueError, match="a kernel of 6 queries by 4 keys"):
        MultiToken(16, 4, key_kernel=4)
    with pytest.raises(ValueError, match="a kernel of 2 queries by 0 keys"):
        MultiToken(16, 4, post_query_kernel=2)
    module = MultiToken(16, 4, causal=True)
    with pytest.raises(ValueError, match="dense mask was given with a state"):
        module(torch.randn(1, 2, 16), mask=torch.ones(1, 1, 2, 2, dtype=torch.bool), state=module.init_state(1))
