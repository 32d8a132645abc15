"""Softmax attention: the equation as loops, and equality with PyTorch's own modules on copied weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.mechanisms.plain.softmax import Softmax

close = torch.testing.assert_close


def loops(module: Softmax, x: Tensor, source: Tensor, causal: bool) -> Tensor:
    """softmax(q_i . k_j / sqrt(d)) v_j one pair at a time, from the module's weights."""
    h, d = module.heads, module.head_dim
    q, k, v = (x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T)
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for head in range(h):
            part = slice(head * d, (head + 1) * d)
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else source.shape[1])
                powers = [math.exp(float(q[b, i, part] @ k[b, j, part]) / math.sqrt(d)) for j in seen]
                for j, power in zip(seen, powers, strict=True):
                    mixed[b, i, part] += power / sum(powers) * v[b, j, part]
    return mixed @ module.o_proj.weight.T


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, cross: bool) -> None:
    torch.manual_seed(0)
    module, x = Softmax(12, 3, causal=causal).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    context = torch.randn(2, 4, 12, dtype=torch.float64) if cross else None
    wanted = loops(module, x, x if context is None else context, causal and not cross)
    for need in (False, True):
        close(module(x, context, need_weights=need).output, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_is_the_kernel(causal: bool) -> None:
    torch.manual_seed(1)
    module, x = Softmax(16, 4, causal=causal).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = ((p(x)).unflatten(-1, (4, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    wanted = module.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2))
    close(module(x).output, wanted, rtol=1e-12, atol=1e-12)


def _copied(bias: bool, causal: bool) -> tuple[Softmax, nn.MultiheadAttention]:
    torch.manual_seed(2)
    ours = Softmax(16, 4, causal=causal, bias=bias).double()
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True, dtype=torch.float64)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            theirs.out_proj.bias.copy_(ours.o_proj.bias)
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_multihead_attention_with_padding(causal: bool, bias: bool) -> None:
    """Values, weights per head and the gradient of x; PyTorch's masks say True = may not attend."""
    ours, theirs = _copied(bias, causal)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    real = torch.arange(7)[None] < torch.tensor([[7], [5]])
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    result = ours(x, mask=real, need_weights=True)
    wanted, weights = theirs(x, x, x, key_padding_mask=~real, attn_mask=future, average_attn_weights=False)
    close(result.output, wanted, rtol=1e-12, atol=1e-12)
    close(result.weights, weights, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours(x, mask=real).output, wanted)]
    close(grads[0], grads[1], rtol=1e-11, atol=1e-11)


def test_cross_equals_multihead_attention() -> None:
    ours, theirs = _copied(True, False)
    x, context = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 8, 16, dtype=torch.float64)
    real = torch.arange(8)[None] < torch.tensor([[3], [8]])
    wanted, _ = theirs(x, context, context, key_padding_mask=~real)
    close(ours(x, context, mask=real).output, wanted, rtol=1e-12, atol=1e-12)


def test_head_mask_equals_multihead_attention() -> None:
    ours, theirs = _copied(False, False)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = (torch.rand(2, 4, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    wanted, _ = theirs(x, x, x, attn_mask=~mask.flatten(0, 1))
    close(ours(x, mask=mask).output, wanted, rtol=1e-12, atol=1e-12)
