"""MoBA (arXiv:2502.13189) against loops over tokens and blocks; its block-sparse kernel against a dense mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.blocks import block_ids, block_means, choose_past_blocks, mean_gates
from manyheads.kernels import block_sparse
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.moba import MoBA
from manyheads.testing import LargestTensor


def loops(module: MoBA, x: Tensor) -> Tensor:
    """Blocks, means, gates, choice and softmax as the paper says it, one query of one head at a time."""
    n, d, shared = len(x), module.head_dim, module.heads // module.kv_heads
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    rows = []
    for i in range(n):
        mixed = []
        for h in range(module.heads):
            keys, values = k[h // shared], v[h // shared]
            own = i // module.block
            gates = {b: float(q[h][i] @ keys[b * module.block : (b + 1) * module.block].mean(0)) for b in range(own)}
            best = sorted(gates, key=lambda b, g=gates: -g[b])[: module.top_k - 1]  # type: ignore[misc]
            seen = [j for j in range(i + 1) if j // module.block in {own, *best}]
            scores = [float(q[h][i] @ keys[j]) / math.sqrt(d) for j in seen]
            total = sum(math.exp(s) for s in scores)
            mixed.append(sum(math.exp(s) / total * values[j] for s, j in zip(scores, seen, strict=True)))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize(("block", "top_k", "kv_heads"), [(4, 3, 4), (5, 2, 2), (3, 1, 1), (1, 4, 2)])
def test_equals_loops(block: int, top_k: int, kv_heads: int) -> None:
    module = MoBA(16, 4, block=block, top_k=top_k, kv_heads=kv_heads).double()
    x = torch.randn(2, 26, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)
        state = module.init_state(2)
        steps = [module(x[:, i : i + 1], state=state).output for i in range(26)]
        torch.testing.assert_close(torch.cat(steps, 1), wanted)


def test_all_blocks_chosen_is_full_attention() -> None:
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    for block, top_k in ((4, 6), (3, 9), (30, 1)):
        module, plain = MoBA(16, 4, block=block, top_k=top_k).double(), Softmax(16, 4, causal=True).double()
        plain.load_state_dict(module.state_dict())
        wanted = plain(x).output
        for result in (module(x), module(x, need_weights=True), module(x, mask=torch.ones(2, 21, dtype=torch.bool))):
            torch.testing.assert_close(result.output, wanted)


@pytest.mark.parametrize("n", [150, 151])  # whole blocks, and a partial one
@pytest.mark.parametrize("share", [16384, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_sparse_equals_stages_with_gradients(padded: bool, share: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "_SHARE", share)
    monkeypatch.setattr(block_sparse, "_TILE", 8)  # more tiles than are computed at once
    module = MoBA(16, 8, block=6, top_k=3, kv_heads=2, rotary={}).double()
    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(n)[None] < torch.tensor([[n - 20], [9]]) if padded else None
    results = []
    for need in (False, True):
        output = module(x, mask=mask, need_weights=need).output
        probe = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        results.append((output, torch.autograd.grad((output * probe).sum(), [x, *module.parameters()])))
    torch.testing.assert_close(results[0], results[1])


def test_operator_is_well_formed() -> None:
    q, k, v = (torch.randn(1, h, 9, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    index = (torch.arange(9) // 4 - 1).clamp(min=0)[None, None, :, None].expand(1, 2, -1, -1)
    chosen = (torch.arange(9) >= 4)[None, None, :, None].expand(1, 2, -1, -1)
    torch.library.opcheck(
        block_sparse._forward, (q, k, v, index, chosen, None, 4, 0.5), test_utils=["test_schema", "test_faketensor"]
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse.block_sparse_attention(q, k, v, index, chosen, 4, scale=0.5, real=None)

    torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


def test_no_square_matrix() -> None:
    n = 2048
    q, k, v = (torch.randn(1, 4, n, 4) for _ in range(3))
    with LargestTensor() as largest:
        index, chosen = choose_past_blocks(q, k, 16, 3, None)
        # What the operators run: from outside, a mode sees each of them as one call.
        out, lse = block_sparse._attend(q, k, v, index, chosen, None, 16, 0.5)
        block_sparse._differentiate(out, q, k, v, out, lse, index, chosen, None, 16, 0.5)
    assert largest.size <= 4 * n * n // 16  # the gates: heads, queries, blocks


def test_blocks_are_counted_by_position() -> None:
    assert block_ids(torch.tensor([[0, 0, 0, 1, 2, 3, 4]]), 3).tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert block_ids(torch.tensor([[7, 8, 9, 10]]), 3).tolist() == [[0, 0, 1, 1]]
    # Positions that start again start a block, and a later block never has a smaller number.
    assert block_ids(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), 3).tolist() == [[0, 0, 0, 1, 2, 2, 2, 3]]
    assert block_ids(torch.tensor([[0, 1, 0, 1, 2, 3]]), 3).tolist() == [[0, 0, 1, 1, 1, 2]]
    module = MoBA(16, 4, block=4, top_k=2).double()
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    dirty = torch.cat([torch.full((1, 3, 16), 1e3, dtype=torch.float64), x], 1)
    mask = torch.arange(21)[None] >= 3
    wanted = module(x).output
    positions = torch.arange(-3, 18)[None]
    for given in (positions.clamp(min=0), positions.masked_fill(positions < 0, 1)):
        found = module(dirty, mask=mask, positions=given).output[:, 3:]
        torch.testing.assert_close(found, wanted)
    shifted = module(dirty, mask=mask).output[:, 3:]
    assert (shifted - wanted).abs().max() > 1e-6


def test_packed_sequences_do_not_meet() -> None:
    """Positions that start again and a dense mask: each document is as if it were alone."""
    module = MoBA(16, 4, block=4, top_k=2).double()
    x = torch.randn(1, 31, 16, dtype=torch.float64)
    document = torch.arange(31) >= 14
    positions = torch.where(document, torch.arange(31) - 14, torch.arange(31))[None]
    mask = (document[:, None] == document)[None, None]
    found = module(x, mask=mask, positions=positions).output
    torch.testing.assert_close(found[:, :14], module(x[:, :14]).output)
    torch.testing.assert_close(found[:, 14:], module(x[:, 14:]).output)


def test_hidden_keys_have_no_part_in_routing() -> None:
    module = MoBA(16, 4, block=4, top_k=2).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    mask = torch.ones(1, 1, 30, 30, dtype=torch.bool)
    mask[..., :, 5] = False
    changed = x.clone()
    changed[:, 5] *= -40
    rest = torch.arange(30) != 5
    found, again = (module(given, mask=mask).output[:, rest] for given in (x, changed))
    torch.testing.assert_close(found, again)


def test_the_choice_has_no_gradient_and_no_scale() -> None:
    q, k = torch.randn(1, 2, 6, 4, requires_grad=True), torch.randn(1, 1, 6, 4, requires_grad=True)
    means, filled = block_means(k, torch.arange(6)[None] // 2, 3, None)
    gates = mean_gates(q, means, filled)
    assert not gates.requires_grad
    torch.testing.assert_close(gates[0, 1, 5, 2], (q[0, 1, 5] @ k[0, 0, 4:].mean(0)).detach())
    low, _ = block_means(k.bfloat16(), torch.arange(6)[None] // 2, 3, None)
    assert low.dtype == torch.float32


def test_every_query_head_chooses_for_itself() -> None:
    module = MoBA(16, 4, block=2, top_k=2, kv_heads=1).double()
    weights = module(torch.randn(1, 24, 16, dtype=torch.float64), need_weights=True).weights
    assert weights is not None
    assert ((weights[0, 0] > 0) != (weights[0, 1] > 0)).any()


@pytest.mark.parametrize(("block", "top_k"), [(0, 2), (4, 0)])
def test_refuses(block: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        MoBA(16, 4, block=block, top_k=top_k)
