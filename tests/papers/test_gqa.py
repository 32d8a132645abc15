"""Grouped-query attention: the equation as loops, its identities, PyTorch's kernel and Llama's attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.projection.gqa import GQA

close = torch.testing.assert_close


def loops(module: GQA, x: Tensor, source: Tensor, causal: bool) -> Tensor:
    """Query head h reads key/value head floor(h / (heads / kv_heads))."""
    d, per_group = module.head_dim, module.heads // module.kv_heads
    q, k, v = (x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T)
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for head in range(module.heads):
            mine, group = slice(head * d, (head + 1) * d), head // per_group
            shared = slice(group * d, (group + 1) * d)
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else source.shape[1])
                powers = [math.exp(float(q[b, i, mine] @ k[b, j, shared]) / math.sqrt(d)) for j in seen]
                for j, power in zip(seen, powers, strict=True):
                    mixed[b, i, mine] += power / sum(powers) * v[b, j, shared]
    return mixed @ module.o_proj.weight.T


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, cross: bool) -> None:
    torch.manual_seed(0)
    module, x = GQA(12, 6, kv_heads=2, causal=causal).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    context = torch.randn(2, 4, 12, dtype=torch.float64) if cross else None
    wanted = loops(module, x, x if context is None else context, causal and not cross)
    for need in (False, True):
        close(module(x, context, need_weights=need).output, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", ["no", "padding", "dense"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_kernel_with_grouped_heads(causal: bool, masked: str) -> None:
    torch.manual_seed(1)
    module, x = GQA(32, 8, kv_heads=2, causal=causal).double(), torch.randn(2, 9, 32, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    past = torch.ones(9, 9, dtype=torch.bool).tril() if causal else torch.ones(9, 9, dtype=torch.bool)
    mask, allowed = None, past.expand(2, 1, 9, 9)
    if masked == "padding":
        mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
        allowed = allowed & mask[:, None, None]
    elif masked == "dense":
        mask = (torch.rand(2, 8, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool)
        allowed = allowed & mask
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    wanted = module.o_proj(mixed.transpose(1, 2).flatten(-2))
    close(module(x, mask=mask).output, wanted, rtol=1e-12, atol=1e-12)


def test_as_many_groups_as_heads_is_softmax() -> None:
    torch.manual_seed(2)
    full, x = Softmax(16, 4, causal=True).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    module = GQA(16, 4, kv_heads=4, causal=True).double()
    module.load_state_dict(full.state_dict())
    close(module(x).output, full(x).output, rtol=0, atol=0)


def test_the_default_is_half_the_heads_or_the_next_divisor() -> None:
    assert [GQA(24, heads).kv_heads for heads in (1, 2, 3, 4, 6, 12)] == [1, 1, 1, 2, 3, 6]


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_equals_llama(base: float) -> None:
    """Copied weights, rotary embedding in halves, left padding by explicit positions."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        attn_implementation="eager",
    )
    theirs, embed = LlamaAttention(config, 0).double().eval(), LlamaRotaryEmbedding(config)
    ours = GQA(32, 4, kv_heads=2, causal=True, rotary={"base": base}).double()
    ours.load_state_dict(theirs.state_dict())
    x, positions = torch.randn(2, 8, 32, dtype=torch.float64), torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5], [*range(8)]])
    mask = torch.tensor([[False, False, *[True] * 6], [True] * 8])
    allowed = mask[:, None, None] & torch.ones(8, 8, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 8, 8, dtype=torch.float64).masked_fill(~allowed, -1e300)
    with torch.no_grad():
        wanted, weights = theirs(x, embed(x, positions), added)
        result = ours(x, mask=mask, positions=positions, need_weights=True)
        fast = ours(x, mask=mask, positions=positions).output
    # Llama takes its angles in float32: so far the two agree, and no further.
    close(result.output[mask], wanted[mask], rtol=1e-6, atol=1e-6)
    close(fast[mask], wanted[mask], rtol=1e-6, atol=1e-6)
    close(result.weights.transpose(1, 2)[mask], weights.transpose(1, 2)[mask], rtol=1e-6, atol=1e-6)
