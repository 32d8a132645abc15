"""BAM (arXiv:2408.08274) against loops over tokens, experts and heads, and against one of its experts alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.mixing.bam import Bam
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.testing import check_mechanism

DIM, HEADS, EXPERTS = 12, 4, 3  # heads of one expert


def head_numbers(module: Bam, expert: int, head: int, groups: int) -> tuple[int, int]:
    """Where the query head of an expert lies, and which key/value head it reads."""
    each = HEADS // groups
    if module.share_kv:
        return (head // each) * each * EXPERTS + expert * each + head % each, head // each
    return expert * HEADS + head, expert * groups + head // each


def loops(module: Bam, x: Tensor, groups: int) -> Tensor:
    d, n = module.head_dim, len(x)
    q, k, v = (getattr(module, f"{part}_proj")(x).split(d, -1) for part in "qkv")
    rows = []
    for i in range(n):
        scores = [float(module.router.weight[e] @ x[i]) for e in range(EXPERTS)]
        total = sum(math.exp(score) for score in scores)
        out = torch.zeros(DIM, dtype=x.dtype)
        for e in range(EXPERTS):
            own = torch.zeros(DIM, dtype=x.dtype) if module.o_bias is None else module.o_bias[e].clone()
            for h in range(HEADS):
                at, read = head_numbers(module, e, h, groups)
                seen = range(i + 1 if module.causal else n)
                terms = [math.exp(float(q[at][i] @ k[read][j]) / math.sqrt(d)) for j in seen]
                head = sum(t * v[read][j] for t, j in zip(terms, seen, strict=True)) / sum(terms)
                own = own + module.o_proj.weight[:, at * d : (at + 1) * d] @ head
            out = out + math.exp(scores[e]) / total * own
        rows.append(out)
    return torch.stack(rows)


def mixture(groups: int, share: bool, **more: Any) -> Bam:
    kv_heads = groups if share else EXPERTS * groups
    module = Bam(DIM, EXPERTS * HEADS, experts=EXPERTS, share_kv=share, kv_heads=kv_heads, **more).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_loops(groups: int, share: bool, causal: bool, bias: bool) -> None:
    module = mixture(groups, share, causal=causal, bias=bias)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x).output, torch.stack([loops(module, row, groups) for row in x]))


@pytest.mark.parametrize("share", [False, True])
def test_experts_that_are_the_same_are_one_of_them(share: bool) -> None:
    module, one = mixture(2, share, bias=True, causal=True), Softmax(DIM, HEADS, kv_heads=2, bias=True, causal=True)
    one = one.double()
    d, kv = module.head_dim, [0, 1] if share else [0, 1] * EXPERTS
    with torch.no_grad():
        for at, expert in enumerate(module.expert_of_head().tolist()):
            head = next(h for h in range(HEADS) if head_numbers(module, expert, h, 2)[0] == at)
            spot, home = slice(at * d, (at + 1) * d), slice(head * d, (head + 1) * d)
            module.q_proj.weight[spot] = one.q_proj.weight[home]
            module.q_proj.bias[spot] = one.q_proj.bias[home]
            module.o_proj.weight[:, spot] = one.o_proj.weight[:, home]
        for part in ("k_proj", "v_proj"):
            for name in ("weight", "bias"):
                heads = getattr(getattr(one, part), name).unflatten(0, (2, d))
                getattr(getattr(module, part), name).copy_(heads[kv].flatten(0, 1))
        module.o_bias.copy_(one.o_proj.bias.expand(EXPERTS, -1))
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, one(x).output)


def test_a_router_that_is_sure_leaves_one_expert() -> None:
    module = mixture(4, False)
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    x[..., 0] = 1.0
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[1, 0] = 200.0
        before = module(x).output
        module.q_proj.weight[: HEADS * module.head_dim].zero_()  # of expert 0
        torch.testing.assert_close(module(x).output, before)
        module.q_proj.weight[HEADS * module.head_dim : 2 * HEADS * module.head_dim].zero_()
        assert (module(x).output - before).abs().max() > 1e-3


def test_each_expert_is_as_wide_as_the_model() -> None:
    assert Bam(12, 12, experts=3).head_dim == 3
    assert Bam(12, 4, experts=2, shell={"head_dim": 5}).head_dim == 5
    assert Bam(12, 4, experts=2, share_kv=True).kv_heads == 2


@pytest.mark.parametrize("config", [{"experts": 2}, {"experts": 4, "share_kv": True, "kv_heads": 1, "rotary": {}}])
def test_conformance(config: dict[str, Any]) -> None:
    check_mechanism(Bam, config=config, largest=9)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"experts": 3}, "want a multiple of experts=3"),
        ({"experts": 0}, "want a multiple of experts=0"),
        ({"kv_heads": 1}, "do not divide evenly"),
        ({"kv_heads": 4, "share_kv": True}, "do not divide evenly"),
        ({"shell": {"qk_norm": "whole"}}, "qk_norm='whole'"),
    ],
)
def test_refuses(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Bam(12, 4, **{"experts": 2, **more})
