"""Multi-head embedding attention: the paper's equation with a key and a value for every head, and what is left out."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.projection.mhe import MHE
from manyheads.mechanisms.projection.mqa import MQA

close = torch.testing.assert_close


def loops(module: MHE, x: Tensor, causal: bool, key_embedding: Tensor) -> Tensor:
    """Every head has q, k and v of its own, as the paper writes it."""
    d = module.head_dim
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    heads = []
    for h in range(module.heads):
        vectors = (module.query_embedding[h], key_embedding[h], module.value_embedding[h])
        qh, kh, vh = (t + e if module.mode == "add" else t * (1 + e) for t, e in zip((q, k, v), vectors, strict=True))
        rows = torch.zeros(*x.shape[:2], d, dtype=x.dtype)
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else x.shape[1])
                powers = [math.exp(float(qh[b, i] @ kh[b, j]) / math.sqrt(d)) for j in seen]
                for j, power in zip(seen, powers, strict=True):
                    rows[b, i] += power / sum(powers) * vh[b, j]
        heads.append(rows)
    return torch.cat(heads, -1) @ module.o_proj.weight.T


def _module(mode: str, causal: bool) -> MHE:
    torch.manual_seed(0)
    module = MHE(12, 3, mode=mode, causal=causal).double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "embedding" in name:
                weight.copy_(torch.randn(weight.shape))
    return module


@pytest.mark.parametrize("mode", ["add", "mul"])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(mode: str, causal: bool) -> None:
    module, x = _module(mode, causal), torch.randn(2, 6, 12, dtype=torch.float64)
    keys = torch.randn(3, 4, dtype=torch.float64) if module.key_embedding is None else module.key_embedding
    close(module(x).output, loops(module, x, causal, keys), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["add", "mul"])
@torch.no_grad()
def test_a_query_with_nothing_to_attend_to_gets_no_embedding(mode: str) -> None:
    module, x = _module(mode, causal=True), torch.randn(2, 4, 12, dtype=torch.float64)
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    for need_weights in (False, True):
        output = module(x, mask=mask, need_weights=need_weights).output
        close(output[0, :2], torch.zeros(2, 12, dtype=torch.float64), rtol=0, atol=0)
        assert bool((output[0, 2:] != 0).all())


@torch.no_grad()
def test_one_key_and_value_are_held_per_token() -> None:
    module, x = _module("mul", causal=True), torch.randn(2, 5, 12, dtype=torch.float64)
    state = module.init_state(2)
    module(x, state=state)
    assert {name: tuple(buffer.view().shape) for name, buffer in state.grown.items()} == {
        "keys": (2, 1, 5, 4),
        "values": (2, 1, 5, 4),
    }


@pytest.mark.parametrize("mode", ["add", "mul"])
@torch.no_grad()
def test_without_embeddings_all_heads_are_one(mode: str) -> None:
    module, x = _module(mode, causal=True), torch.randn(2, 5, 12, dtype=torch.float64)
    plain = MQA(12, 3, causal=True).double()
    for name, weight in module.named_parameters():
        if "embedding" in name:
            weight.zero_()
    for name in ("k_proj", "v_proj", "o_proj"):
        getattr(plain, name).load_state_dict(getattr(module, name).state_dict())
    plain.q_proj.weight.copy_(module.q_proj.weight.repeat(3, 1))
    close(module(x).output, plain(x).output, rtol=1e-12, atol=1e-12)


def test_parameters_beside_a_single_head() -> None:
    """3 h d of them, as the abstract says; the key's are nothing to softmax in mode add."""
    dim, heads, d = 12, 3, 4
    shared = 3 * dim * d + dim * dim
    assert sum(p.numel() for p in MHE(dim, heads, mode="mul").parameters()) == shared + 3 * heads * d
    assert sum(p.numel() for p in MHE(dim, heads, mode="add").parameters()) == shared + 2 * heads * d


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='concat'"):
        MHE(8, 2, mode="concat")
