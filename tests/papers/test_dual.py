"""Dual attention: relations and symbols pair by pair, and its two kinds of heads apart."""

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.projection.dual import Dual

close = torch.testing.assert_close


def shares(query: Tensor, keys: list[Tensor], scale: float) -> list[float]:
    powers = [math.exp(float(query @ key) * scale) for key in keys]
    return [power / sum(powers) for power in powers]


def symbols_of(module: Dual, x: Tensor) -> Tensor:
    d = module.dim // module.heads
    q = x @ module.template_q_proj.weight.T + module.template_q_proj.bias
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            for s, share in enumerate(shares(q[i, part], [t[part] for t in module.templates], d**-0.5)):
                out[i, part] += share * module.library[s, part]
    return out


def loops(module: Dual, x: Tensor, causal: bool) -> Tensor:
    """One sequence; r_ij [relations] of each pair is written out."""
    n, d, first = len(x), module.dim // module.heads, module.sensory
    wide = module.relational * d
    size = wide // module.relations
    q, k = x @ module.q_proj.weight.T, x @ module.k_proj.weight.T
    rq, rk = x @ module.relation_q_proj.weight.T, x @ module.relation_k_proj.weight.T
    symbols = symbols_of(module, x) @ module.symbol_proj.weight.T
    v = x @ module.v_proj.weight.T if module.v_proj is not None else None
    sensory, relational = torch.zeros(n, module.dim - wide, dtype=x.dtype), torch.zeros(n, wide, dtype=x.dtype)
    for i in range(n):
        seen = range(i + 1 if causal else n)
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            for j, share in zip(seen, shares(q[i, part], [k[j, part] for j in seen], d**-0.5), strict=True):
                if h < first:
                    sensory[i, part] += share * v[j, part]
                    continue
                relation = torch.stack(
                    [
                        rq[i, line * size : (line + 1) * size]
                        @ rk[j, line * size : (line + 1) * size]
                        / math.sqrt(size)
                        for line in range(module.relations)
                    ]
                )
                own = slice((h - first) * d, (h - first + 1) * d)
                relational[i, own] += share * (module.relation_mix[h - first] @ relation + symbols[j, own])
    relational = relational @ module.relational_o_proj.weight.T
    return relational if v is None else torch.cat([sensory @ module.o_proj.weight.T, relational], 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"relational_heads": 1, "relations": 4}, {"relational_heads": 3, "relations": 2}, {"relational_heads": 4}],
)
@torch.no_grad()
def test_equals_loops(causal: bool, settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = Dual(16, 4, causal=causal, symbols=5, **settings).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    for need_weights in (False, True):
        output = module(x, need_weights=need_weights).output[0]
        close(output, loops(module, x[0], causal), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_sensory_heads_are_softmax_attention() -> None:
    torch.manual_seed(0)
    module, plain = Dual(16, 4, causal=True, symbols=5).double(), Softmax(16, 4, causal=True).double()
    for name in ("q_proj", "k_proj"):
        getattr(plain, name).load_state_dict(getattr(module, name).state_dict())
    plain.v_proj.weight[:8] = module.v_proj.weight
    plain.o_proj.weight.zero_()
    plain.o_proj.weight[:8, :8] = module.o_proj.weight
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    one, other = module(x, need_weights=True), plain(x, need_weights=True)
    close(one.output[..., :8], other.output[..., :8], rtol=1e-12, atol=1e-12)
    close(one.weights, other.weights, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_dense_mask_per_head_reaches_its_head() -> None:
    torch.manual_seed(0)
    module, x = Dual(16, 4, symbols=5).double(), torch.randn(1, 6, 16, dtype=torch.float64)
    mask = torch.ones(1, 4, 6, 6, dtype=torch.bool)
    mask[:, 3, :, 2] = False
    weights = module(x, mask=mask, need_weights=True).weights
    assert bool((weights[:, 3, :, 2] == 0).all())
    assert bool((weights[:, :3] > 0).all())
    close(module(x, mask=mask).output, module(x, mask=mask, need_weights=True).output, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_step_does_not_copy_relation_keys_to_every_head() -> None:
    torch.manual_seed(0)
    module, x = Dual(64, 8, causal=True, symbols=5), torch.randn(1, 201, 64)
    state = module.init_state(1, capacity=300)
    module(x[:, :200], state=state)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step = module(x[:, 200:], state=state).output
    one_head = 201 * 32 * 4
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 2 * one_head
    close(step, module(x).output[:, 200:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_many_queries_equal_few() -> None:
    """Beside the values of all heads side by side (8 features), 9 queries go through the kernel, 8 do not."""
    torch.manual_seed(0)
    module, x = Dual(16, 4, causal=True, symbols=5).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 9, [False, True, True, False, True, True, True, True, True]])
    for given in (None, mask):
        few = module(x[:, :8], mask=None if given is None else given[:, :8]).output
        close(module(x, mask=given).output[:, :8], few, rtol=1e-12, atol=1e-12)
        close(module(x, mask=given, need_weights=True).output[:, :8], few, rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="relational_heads=5 of heads=4"):
        Dual(16, 4, relational_heads=5)
    with pytest.raises(ValueError, match="relations=3 must divide the 8"):
        Dual(16, 4, relations=3)
