"""Mixture of attention heads (arXiv:2210.05144) against loops over tokens and experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.routing import grouped_linear
from manyheads.mechanisms.mixing.moa import MixtureOfAttentionHeads
from manyheads.mechanisms.projection.mqa import MQA


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def route(module: MixtureOfAttentionHeads, x: Tensor) -> tuple[list[float], list[int]]:
    probs = softmax((module.router.weight @ x).tolist())
    return probs, sorted(range(len(probs)), key=lambda e: -probs[e])[: module.active]


def loops(module: MixtureOfAttentionHeads, x: Tensor, context: Tensor | None) -> Tensor:
    source = x if context is None else context
    keys, values = source @ module.k_proj.weight.T, source @ module.v_proj.weight.T
    rows = []
    for i in range(len(x)):
        seen = range(i + 1 if module.causal and context is None else len(source))
        probs, best = route(module, x[i])
        row = torch.zeros_like(x[i])
        for e in best:
            query = x[i] @ module.q_experts[e] / math.sqrt(module.head_dim)
            shares = softmax([float(query @ keys[j]) for j in seen])
            mixed = sum(w * values[j] for w, j in zip(shares, seen, strict=True))
            row = row + probs[e] * (mixed @ module.o_experts[e])
        rows.append(row)
    return torch.stack(rows)


def build(heads: int = 6, active: int = 2, causal: bool = False, **config: object) -> MixtureOfAttentionHeads:
    module = MixtureOfAttentionHeads(16, heads, active=active, causal=causal, **config).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(module.router.weight)
    return module


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "active", "head_dim"), [(6, 2, None), (4, 4, 5), (5, 1, 3)])
def test_equals_loops(heads: int, active: int, head_dim: int | None, causal: bool, cross: bool) -> None:
    module = build(heads, active, causal, head_dim=head_dim)
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    context = torch.randn(2, 5, 16, dtype=torch.float64) if cross else None
    with torch.no_grad():
        wanted = torch.stack([loops(module, x[b], None if context is None else context[b]) for b in range(2)])
        for need in (False, True):
            torch.testing.assert_close(module(x, context, need_weights=need).output, wanted)


def test_only_the_chosen_experts_are_computed() -> None:
    module = build(8, 2)
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    wanted = module(x).output
    _, best = route(module, x[0, 0])
    off = [e for e in range(8) if e not in best]
    with torch.no_grad():
        module.q_experts[off] = torch.nan
        module.o_experts[off] = torch.nan
    torch.testing.assert_close(module(x).output, wanted)


def test_grouped_linear_is_a_matrix_per_row() -> None:
    rows, weight = torch.randn(11, 4, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    experts = torch.tensor([3, 0, 3, 3, 1, 0, 4, 1, 1, 0, 3])
    wanted = torch.stack([row @ weight[e] for row, e in zip(rows, experts, strict=True)])
    torch.testing.assert_close(grouped_linear(rows, experts, weight), wanted)


def test_one_expert_is_multi_query_attention_with_one_head() -> None:
    module, plain = build(1, 1, True), MQA(16, 1, causal=True).double()
    with torch.no_grad():
        plain.q_proj.weight.copy_(module.q_experts[0].T)
        plain.o_proj.weight.copy_(module.o_experts[0].T)
        plain.k_proj.weight.copy_(module.k_proj.weight)
        plain.v_proj.weight.copy_(module.v_proj.weight)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_weights_are_gated_and_their_sum_gives_the_output() -> None:
    module, x = build(), torch.randn(2, 7, 16, dtype=torch.float64)
    result = module(x, need_weights=True)
    assert result.weights is not None
    probs = module.router(x).softmax(-1).transpose(1, 2)
    total = result.weights.sum(-1)
    on = total > 0
    torch.testing.assert_close(on.sum(1), torch.full((2, 7), 2))
    torch.testing.assert_close(total[on], probs[on])
    mixed = result.weights @ (x @ module.v_proj.weight.T)[:, None]
    torch.testing.assert_close(torch.einsum("bend,edm->bnm", mixed, module.o_experts), result.output)


def test_losses_over_real_tokens() -> None:
    module, x = build(), torch.randn(2, 9, 16, dtype=torch.float64)
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    given, chances, chosen, size = [0.0] * 6, [0.0] * 6, [0.0] * 6, 0.0
    for b, i in mask.nonzero().tolist():
        probs, best = route(module, x[b, i])
        size += math.log(sum(math.exp(s) for s in (module.router.weight @ x[b, i]).tolist())) ** 2
        for e in range(6):
            chances[e] += probs[e]
            given[e] += probs[e] * (e in best)
            chosen[e] += e in best
    shares = [g / sum(given) for g in given]
    mean = sum(shares) / 6
    wanted = {
        "cv": sum((s - mean) ** 2 for s in shares) / 5 / mean**2,
        "switch": 6 * sum(p / 13 * f / 26 for p, f in zip(chances, chosen, strict=True)),
        "z": size / 13,
    }
    losses = module(torch.where(mask[..., None], x, 1e3), mask=mask).losses
    torch.testing.assert_close({name: loss.item() for name, loss in losses.items()}, wanted)
    assert all(loss.item() == 0 for loss in module(x, mask=torch.zeros_like(mask)).losses.values())


def test_a_dense_mask_follows_the_expert_and_padding_gates_nothing() -> None:
    module, x = build(), torch.randn(1, 6, 16, dtype=torch.float64)
    mask = torch.ones(1, 6, 6, 6, dtype=torch.bool)
    mask[:, 3, :, 2] = False
    result = module(x, mask=mask, need_weights=True)
    free = module(x, need_weights=True)
    assert result.weights is not None
    assert free.weights is not None
    assert (result.weights[:, 3, :, 2] == 0).all()
    torch.testing.assert_close(result.weights[:, :3], free.weights[:, :3])
    torch.testing.assert_close(module(x, mask=mask).output, result.output)
    padded = module(x, mask=torch.arange(6)[None] < 4).output
    assert (padded[:, 4:] == 0).all()


def test_tokens_differ_in_their_experts_from_the_first_step() -> None:
    module = MixtureOfAttentionHeads(64, 8)
    chosen = module.router(torch.randn(1, 50, 64)).topk(4, -1).indices
    assert len(chosen.flatten().unique()) == 8


@pytest.mark.parametrize("config", [{"active": 0}, {"active": 9}, {"active": 3}, {"head_dim": 0}])
def test_refuses(config: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="moa: "):
        MixtureOfAttentionHeads(16, 8, **config)  # type: ignore[arg-type]
