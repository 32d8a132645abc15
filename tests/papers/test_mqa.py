"""Multi-query attention: the equation as loops, and its identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.projection.gqa import GQA
from manyheads.mechanisms.projection.mqa import MQA

close = torch.testing.assert_close


def loops(module: MQA, x: Tensor, source: Tensor, causal: bool) -> Tensor:
    """Every head h reads the one key k_j and the one value v_j."""
    d = module.head_dim
    q, k, v = (x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T)
    assert k.shape[-1] == v.shape[-1] == d
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for head in range(module.heads):
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else source.shape[1])
                mine = q[b, i, head * d : (head + 1) * d]
                powers = [math.exp(float(mine @ k[b, j]) / math.sqrt(d)) for j in seen]
                for j, power in zip(seen, powers, strict=True):
                    mixed[b, i, head * d : (head + 1) * d] += power / sum(powers) * v[b, j]
    return mixed @ module.o_proj.weight.T


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, cross: bool) -> None:
    torch.manual_seed(0)
    module, x = MQA(12, 3, causal=causal).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    context = torch.randn(2, 4, 12, dtype=torch.float64) if cross else None
    wanted = loops(module, x, x if context is None else context, causal and not cross)
    for need in (False, True):
        close(module(x, context, need_weights=need).output, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_kernel_with_grouped_heads(causal: bool) -> None:
    torch.manual_seed(1)
    module, x = MQA(16, 4, causal=causal).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    close(module(x).output, module.o_proj(mixed.transpose(1, 2).flatten(-2)), rtol=1e-12, atol=1e-12)


def test_is_gqa_with_one_group() -> None:
    torch.manual_seed(2)
    module, x = MQA(16, 4, causal=True, rotary={"base": 100.0}).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    group = GQA(16, 4, kv_heads=1, causal=True, rotary={"base": 100.0}).double()
    group.load_state_dict(module.state_dict())
    close(group(x).output, module(x).output, rtol=0, atol=0)


def test_is_softmax_with_equal_heads() -> None:
    """Repeating the shared key and value projection for every head gives multi-head attention."""
    torch.manual_seed(3)
    module, full = MQA(16, 4, causal=True).double(), Softmax(16, 4, causal=True).double()
    weights = dict(module.state_dict())
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].repeat(4, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    close(module(x).output, full(x).output, rtol=1e-12, atol=1e-12)


def test_the_state_is_smaller_by_the_number_of_heads() -> None:
    x, sizes = torch.randn(1, 8, 16), []
    for module in (MQA(16, 4, causal=True), Softmax(16, 4, causal=True)):
        state = module.init_state(1)
        with torch.no_grad():
            module(x, state=state)
        sizes.append(state.nbytes)
    assert sizes[0] * 4 == sizes[1]
