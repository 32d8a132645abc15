"""MSWA (arXiv:2501.01039) against loops over tokens; its banded kernel against a dense mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.banded import banded_attention
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.mswa import MSWA, mswa_layers
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.testing import LargestTensor


def loops(module: MSWA, x: Tensor) -> Tensor:
    heads, shared, d = module.heads, module.heads // module.kv_heads, module.head_dim
    weight = {name: getattr(module, f"{name}_proj").weight for name in "qkvo"}
    rows = []
    for i in range(len(x)):
        mixed = []
        for h in range(heads):
            window = [module.window // 4, module.window // 2, module.window, 2 * module.window][h // (heads // 4)]
            own, theirs = slice(h * d, (h + 1) * d), slice(h // shared * d, (h // shared + 1) * d)
            near = range(max(0, i - window + 1), i + 1)
            scores = [float((weight["q"][own] @ x[i]) @ (weight["k"][theirs] @ x[j])) / math.sqrt(d) for j in near]
            total = sum(math.exp(s) for s in scores)
            shares = zip(scores, near, strict=True)
            mixed.append(sum(math.exp(s) / total * (weight["v"][theirs] @ x[j]) for s, j in shares))
        rows.append(weight["o"] @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, 4), (8, 4, 8), (8, 2, 4)])
def test_equals_loops(heads: int, kv_heads: int, window: int) -> None:
    module = MSWA(16, heads, window=window, kv_heads=kv_heads).double()
    x = torch.randn(2, 27, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_four_equal_groups_take_fifteen_sixteenths_of_one_window() -> None:
    module = MSWA(16, 8, window=32)
    assert module.windows == [8, 8, 16, 16, 32, 32, 64, 64]
    assert sum(module.windows) / 8 == 32 * 15 / 16


def test_wide_windows_are_plain_causal_attention() -> None:
    module, plain = MSWA(16, 4, window=80).double(), Softmax(16, 4, causal=True).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(("n", "behind"), [(150, 0), (131, 20), (64, 200)])
def test_band_equals_dense_mask(n: int, behind: int, padding: str | None) -> None:
    m, windows = n + behind, [1, 7, 33, 90]
    q, k, v = (torch.randn(2, *s, 6, dtype=torch.float64, requires_grad=True) for s in ((4, n), (2, m), (2, m)))
    real = None
    if padding:
        real = torch.arange(m)[None] >= torch.tensor([[17], [40]])
        real = real.flip(1) if padding == "right" else real
    lag = torch.arange(m)[behind:, None] - torch.arange(m)
    allowed = torch.stack([(lag >= 0) & (lag < w) for w in windows])[None].expand(2, -1, -1, -1)
    allowed = allowed if real is None else allowed & real[:, None, None]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~allowed, -1e300)
    wanted = scores.softmax(-1).masked_fill(~allowed, 0) @ v.repeat_interleave(2, 1)
    found = banded_attention(q, k, v, windows, scale=0.3, padding=real)
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad((t * probe).sum(), (q, k, v)) for t in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_no_square_matrix(padded: bool) -> None:
    n = 2048
    module, x = MSWA(16, 4, window=16), torch.randn(1, n, 16, requires_grad=True)
    mask = torch.arange(n)[None] < n - 5 if padded else None
    with LargestTensor() as largest:
        module(x, mask=mask).output.sum().backward()
    assert largest.size <= n * 16 * 16


def test_grouped_heads_decode_from_the_first_token() -> None:
    """One query and one key: nothing but the window itself makes the mask, which must still be cut by head."""
    module, x = MSWA(16, 4, window=4, kv_heads=2).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    state = module.init_state(2)
    with torch.no_grad():
        steps = [module(x[:, i : i + 1], state=state).output for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), module(x).output)
        torch.testing.assert_close(module(x[:, :1]).output, steps[0])


def test_state_holds_the_widest_window_only() -> None:
    module = MSWA(16, 4, window=4)
    state = module.init_state(1)
    sizes = []
    with torch.no_grad():
        for _ in range(40):
            module(torch.randn(1, 1, 16), state=state)
            sizes.append(state.nbytes)
    assert len(state.grown["keys"]) == 7
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("heads", "window", "word"), [(2, 8, "multiple of 4"), (4, 6, "multiple of 4"), (4, 0, "window")]
)
def test_refuses(heads: int, window: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MSWA(16, heads, window=window)


def test_windows_grow_over_depth_within_the_budget_of_one_window() -> None:
    """Every window of every head of every layer, summed: 225/256 of one window everywhere, and each of the sixteen
    combinations as often."""
    layers, heads, window = 8, 4, 64
    specs = mswa_layers(layers, window)
    assert [spec["window"] for spec in specs] == [16, 16, 32, 32, 64, 64, 128, 128]
    seen = [w for spec in specs for w in MSWA(16, heads, window=spec["window"]).windows]
    assert sum(seen) * 256 == 225 * layers * heads * window
    assert sorted(seen) == sorted(2 * [window // 16 * 2**depth * 2**head for depth in range(4) for head in range(4)])
    model = ManyheadsForCausalLM(
        ManyheadsConfig(vocab_size=9, hidden_size=16, intermediate_size=0, num_hidden_layers=8, layers=specs)
    )
    assert [block.self_attn.mechanism.span for block in model.base_model.stack.layers] == [
        2 * spec["window"] for spec in specs
    ]
    for wrong in ((6, 64), (0, 64), (4, 8), (4, 24), (True, 64)):
        with pytest.raises(ValueError, match="want a multiple of"):
            mswa_layers(*wrong)
