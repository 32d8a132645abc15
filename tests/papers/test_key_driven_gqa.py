"""KDGQA, DGQA and PGQA (arXiv:2408.08454) against loops and against grouped-query attention."""

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from manyheads.mechanisms.mixing.key_driven_gqa import DGQA, KDGQA, PGQA, allot, owners
from manyheads.mechanisms.projection.gqa import GQA
from manyheads.testing import check_mechanism


def by_hand(norms: list[float], heads: int) -> list[int]:
    """KDGQA's allocation in the released code, without its 0 / 0."""
    low, high = min(norms), max(norms)
    return dealt([1.0 if high == low else (n - low) / (high - low) for n in norms], heads)


def dealt(shares: list[float], heads: int) -> list[int]:
    counts = [round(heads * share / sum(shares)) for share in shares]
    while sum(counts) > heads:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < heads:
        counts[counts.index(min(counts))] += 1
    return counts


def attention(module: KDGQA | DGQA, x: Tensor, source: Tensor, counts: list[int]) -> Tensor:
    d, causal = module.head_dim, module.causal
    q, k, v = x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T
    served = [g for g, count in enumerate(counts) for _ in range(count)]
    rows = []
    for i in range(len(x)):
        mixed = []
        for h, g in enumerate(served):
            seen = range(i + 1 if causal else len(source))
            query = q[i, h * d : (h + 1) * d]
            terms = [math.exp(float(query @ k[j, g * d : (g + 1) * d]) / math.sqrt(d)) for j in seen]
            mixed.append(sum(t / sum(terms) * v[j, g * d : (g + 1) * d] for t, j in zip(terms, seen, strict=True)))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


def norms_of(module: KDGQA | DGQA, source: Tensor) -> list[float]:
    k = source @ module.k_proj.weight.T
    return [math.sqrt(float((part**2).sum())) for part in k.detach().split(module.head_dim, 1)]


@pytest.mark.parametrize("m", [None, 5])
@torch.no_grad()
def test_kdgqa_equals_loops(m: int | None) -> None:
    module = KDGQA(24, 12, kv_heads=4).double()
    module.k_proj.weight.mul_(torch.tensor([1.0, 3.0, 2.0, 0.5]).repeat_interleave(2)[:, None])
    x = torch.randn(3, 6, 24, dtype=torch.float64)
    context = None if m is None else torch.randn(3, m, 24, dtype=torch.float64)
    found = module(x, context).output
    for row in range(3):
        source = x[row] if context is None else context[row]
        counts = by_hand(norms_of(module, source), 12)
        assert counts[3] == 0
        torch.testing.assert_close(found[row], attention(module, x[row], source, counts))


@pytest.mark.parametrize("seed", range(20))
def test_allotment_equals_the_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 + seed % 5
    norms = torch.rand(groups, generator=generator, dtype=torch.float64)
    low, high = norms.min(), norms.max()
    shares = (norms - low) / (high - low) if groups > 1 else torch.ones(1, dtype=torch.float64)
    assert allot(shares, 12).tolist() == by_hand(norms.tolist(), 12)


def test_allotment_of_equal_norms_is_even_and_heads_go_in_order() -> None:
    assert allot(torch.zeros(4), 12).tolist() == [3, 3, 3, 3]
    assert allot(torch.ones(5), 12).sum() == 12
    assert owners(torch.tensor([0, 2, 1]), 3).tolist() == [1, 1, 2]


@torch.no_grad()
def test_kdgqa_rows_decide_for_themselves() -> None:
    module = KDGQA(16, 8, kv_heads=4).double()
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output[1:2], module(x[1:2]).output)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_dgqa_equals_loops_and_evenly_is_gqa(causal: bool) -> None:
    module = DGQA(16, 8, kv_heads=4, allocation=[3, 0, 4, 1], causal=causal).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    wanted = torch.stack([attention(module, row, row, [3, 0, 4, 1]) for row in x])
    torch.testing.assert_close(module(x).output, wanted)
    even, grouped = DGQA(16, 8, kv_heads=4, causal=causal).eval(), GQA(16, 8, kv_heads=4, causal=causal)
    grouped.load_state_dict({k: v for k, v in even.state_dict().items() if k.endswith("weight")})
    torch.testing.assert_close(even(x.float()).output, grouped(x.float()).output)


@torch.no_grad()
def test_dgqa_copies_no_keys_to_the_heads_that_share_them() -> None:
    module, x = DGQA(64, 8, kv_heads=2, allocation=[7, 1], causal=True).eval(), torch.randn(1, 201, 64)
    state = module.init_state(1, capacity=300)
    module(x[:, :200], state=state)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step = module(x[:, 200:], state=state).output
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 201 * 16 * 4  # those that are held, in bytes
    torch.testing.assert_close(step, module(x).output[:, 200:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dgqa_masks_per_head_reach_their_heads() -> None:
    module = DGQA(16, 8, kv_heads=4, allocation=[3, 0, 4, 1]).double().eval()
    x, mask = torch.randn(2, 6, 16, dtype=torch.float64), torch.rand(2, 8, 6, 6) < 0.6
    result = module(x, mask=mask, need_weights=True)
    assert (result.weights[~mask] == 0).all()
    torch.testing.assert_close(module(x, mask=mask).output, result.output)


@pytest.mark.parametrize("rule", ["ema", "diff"])
def test_dgqa_learns_its_groups_in_training_only(rule: str) -> None:
    module = DGQA(16, 8, kv_heads=4, rule=rule, window=2).double()
    with torch.no_grad():
        module.k_proj.weight.mul_(torch.tensor([1.0, 4.0, 2.0, 0.5]).repeat_interleave(2)[:, None])
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    cache, wanted = [0.0] * 4, module.counts.tolist()
    for step in range(1, 8):
        x = torch.randn(2, 6, 16, dtype=torch.float64)
        module(x.masked_fill(~mask[..., None], 50.0), mask=mask)
        # Groups of a pass are those that the passes before it made.
        assert module.counts.tolist() == wanted
        torch.testing.assert_close(module.cache, torch.tensor(cache, dtype=torch.float64))
        if step % 2:
            continue
        real = [norms_of(module, x[0]), norms_of(module, x[1, :4])]
        norms = [(a + b) / 2 for a, b in zip(*real, strict=True)]
        if rule == "ema":
            cache = [0.9 * n + 0.1 * c for n, c in zip(norms, cache, strict=True)]
            wanted = dealt(cache, 8)
            assert min(wanted) > 0  # not stretched: the weakest key head keeps its share
        else:
            shares = [abs(c - n) for n, c in zip(norms, cache, strict=True)]
            wanted, cache = allot(torch.tensor(shares, dtype=torch.float64), 8).tolist(), norms
    learned = module.counts.tolist()
    module.eval()
    module(torch.randn(2, 6, 16, dtype=torch.float64))
    module(torch.randn(2, 6, 16, dtype=torch.float64))
    assert module.counts.tolist() == learned
    assert int(module.passes) == 7


@torch.no_grad()
def test_pgqa_noise_has_the_moments_of_what_it_is_subtracted_from() -> None:
    module, grouped = PGQA(16, 4, kv_heads=2).double(), GQA(16, 4, kv_heads=2).double()
    grouped.load_state_dict(module.state_dict())
    for either in (module, grouped):
        either.o_proj.weight.copy_(torch.eye(16))
    x, mask = torch.randn(2, 9, 16, dtype=torch.float64), torch.arange(9)[None] < torch.tensor([[9], [5]])
    heads = grouped(x, mask=mask).output.unflatten(-1, (4, 4)).transpose(1, 2)
    noise = heads - module.train()(x, mask=mask).output.unflatten(-1, (4, 4)).transpose(1, 2)
    for row, real in enumerate((9, 5)):
        for h in range(4):
            own, of = noise[row, h, :real].flatten(), heads[row, h, :real].flatten()
            torch.testing.assert_close(own.mean(), of.mean())
            torch.testing.assert_close(own.std(), of.std())
            assert own.unique().numel() > 10
            # The entry (h, h) of the noise is zero before it is scaled: with uniform numbers in [0, 1) the least.
            assert own.argmin() == h
    assert (noise[1, :, 5:] == 0).all()
    torch.testing.assert_close(module.eval()(x, mask=mask).output, grouped(x, mask=mask).output)


@pytest.mark.parametrize("allocation", [[4], [5, 4], [9, -1], [1, 2, 5]])
def test_dgqa_refuses(allocation: list[int]) -> None:
    with pytest.raises(ValueError, match="allocation"):
        DGQA(16, 8, kv_heads=2, allocation=allocation)


def test_dgqa_groups_that_change_in_a_pass_leave_its_gradient_alone() -> None:
    module = DGQA(16, 8, kv_heads=4, window=1).double()
    fixed = DGQA(16, 8, kv_heads=4).double().eval()
    fixed.load_state_dict(module.state_dict())
    with torch.no_grad():
        for either in (module, fixed):
            either.k_proj.weight.mul_(torch.tensor([1.0, 4.0, 2.0, 0.5]).repeat_interleave(2)[:, None])
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for either in (module, fixed):
        either(x).output.square().sum().backward()
    for one, other in zip(module.parameters(), fixed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    module(x)
    assert module.counts.tolist() != fixed.counts.tolist()


@pytest.mark.parametrize(("rule", "window"), [("ema", 1), ("diff", 1), ("ema", 3)])
def test_dgqa_checkpointed_while_its_groups_change(rule: str, window: int) -> None:
    check_mechanism(DGQA, config={"rule": rule, "window": window}, properties=["checkpoint"])
