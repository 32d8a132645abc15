"""TAB (arXiv:2412.18675) against loops, its bounds, and edited attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.mechanisms.scoring.attention_bottleneck import AttentionBottleneck

close = torch.testing.assert_close


def by_loops(module: AttentionBottleneck, query: Tensor, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """query, cls [dim], patches [m, dim] -> y [dim] and the weights that mix [h, 1 + m]."""
    d, mixed, rows = module.head_dim, [], []
    for h in range(module.heads):
        own = slice(h * d, (h + 1) * d)
        q = module.q_proj.weight[own] @ query
        tokens = [cls, *patches]
        terms = [math.exp(float(q @ (module.k_proj.weight[own] @ token)) / math.sqrt(d)) for token in tokens]
        shares = [term / sum(terms) for term in terms]
        gate = 1 - shares[0]
        total = torch.zeros(d, dtype=cls.dtype)
        for share, token in zip(shares, tokens, strict=True):
            total += gate * share * (module.v_proj.weight[own] @ token)
        mixed.append(total)
        rows.append(torch.tensor([gate * share for share in shares], dtype=cls.dtype))
    return module.o_proj.weight @ torch.cat(mixed), torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_pool_equals_loops(heads: int) -> None:
    module, x = AttentionBottleneck(12, heads).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    result = module(x, mask=mask, need_weights=True)
    for row, real in enumerate((6, 4)):
        output, weights = by_loops(module, x[row, 0], x[row, 0], x[row, 1:real])
        close(result.output[row], output)
        close(result.weights[row, :, 0, :real], weights)
    assert (result.weights[1, ..., 4:] == 0).all()


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_cross_equals_loops(heads: int) -> None:
    module, x = AttentionBottleneck(12, heads).double(), torch.randn(2, 3, 12, dtype=torch.float64)
    other = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3]])
    result = module(x, other, mask=mask, need_weights=True)
    for row, real in enumerate((5, 3)):
        for i in range(3):
            output, weights = by_loops(module, x[row, i], other[row, 0], other[row, 1:real])
            close(result.output[row, i], output)
            close(result.weights[row, :, i, :real], weights)


@torch.no_grad()
def test_a_pool_is_the_cross_form_on_its_own_tokens() -> None:
    module, x = AttentionBottleneck(12, 3).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    close(module(x).output, module(x[:, :1], x).output[:, 0])


@torch.no_grad()
def test_two_images_read_each_other_and_differ_from_ungated_attention_by_the_gate() -> None:
    module = AttentionBottleneck(12, 1).double()
    one, other = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    for own, read in ((one, other), (other, one)):
        q, k, v = module.q_proj(own[:, :1]), module.k_proj(read), module.v_proj(read)
        share = (q @ k.transpose(1, 2) / 12**0.5).softmax(-1)[..., :1]
        plain = module.o_proj(F.scaled_dot_product_attention(q, k, v))
        close(module(own[:, :1], read).output, (1 - share) * plain)


@torch.no_grad()
def test_a_dense_mask_reaches_its_query_and_its_head() -> None:
    module, x = AttentionBottleneck(12, 2).double(), torch.randn(1, 2, 12, dtype=torch.float64)
    other = torch.randn(1, 5, 12, dtype=torch.float64)
    mask = torch.ones(1, 2, 2, 5, dtype=torch.bool)
    mask[0, 0, 1, 0] = False  # no class token to fall back on: the gate is open
    mask[0, 1, 1, 1:] = False  # no patch: the gate is shut
    weights = module(x, other, mask=mask, need_weights=True).weights
    close(weights[0, 0, 1].sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (weights[0, 1, 1] == 0).all()
    close(weights[0, :, 0], module(x, other, need_weights=True).weights[0, :, 0])


@torch.no_grad()
def test_attention_over_patches_lies_between_nothing_and_one() -> None:
    module, x = AttentionBottleneck(12, 1).double(), torch.randn(1, 6, 12, dtype=torch.float64)
    weights = module(x, need_weights=True).weights[0, 0, 0]
    assert 0 < weights[1:].sum() < 1
    close(weights.sum() ** 2, weights[1:].sum())  # g and g^2
    module.k_proj.weight.copy_(50 * module.q_proj.weight)
    alone = torch.cat((x[:, :1], -x[:, :1].expand(-1, 5, -1)), 1)
    result = module(alone, need_weights=True)
    close(result.weights.sum(), torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0)
    close(result.output, torch.zeros_like(result.output), atol=1e-5, rtol=0)


@torch.no_grad()
def test_edited_attention() -> None:
    module, x = AttentionBottleneck(12, 1).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    weights = module(x, need_weights=True).weights
    close(module.from_attention(weights, x)[:, 0], module(x).output)
    only_second = torch.zeros_like(weights)
    only_second[..., 2] = 1.0
    wanted = module.o_proj(module.v_proj(x[:, 2]))
    close(module.from_attention(only_second, x)[:, 0], wanted)
    close(module.from_attention(only_second[..., 1:], x[:, 1:])[:, 0], wanted)  # over the patches alone
    assert (module.from_attention(0 * weights, x) == 0).all()


@torch.no_grad()
def test_a_class_token_alone_passes_nothing() -> None:
    module, x = AttentionBottleneck(12, 3).double(), torch.randn(2, 1, 12, dtype=torch.float64)
    assert (module(x).output == 0).all()
    assert (module(x, x).output == 0).all()


def test_a_pool_takes_no_dense_mask() -> None:
    with pytest.raises(ValueError, match="a pool, which has one query"):
        AttentionBottleneck(12, 3)(torch.randn(2, 4, 12), mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))
