"""Neural attention search (arXiv:2502.13251) against loops over tokens and their kinds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.nats import GLOBAL, LOCAL, SLIDING, NAtS


def kinds(module: NAtS, x: Tensor, g: int) -> list[int]:
    logits = x @ module.kind_proj.weight[3 * g : 3 * g + 3].T
    favoured = logits + torch.tensor([0.1, 0.0, 0.0], dtype=x.dtype)
    return [GLOBAL, *favoured.argmax(-1).tolist()[1:]]


def visible(found: list[int], i: int, window: int) -> list[int]:
    seen = []
    for j in range(i + 1):
        local = GLOBAL not in found[j + 1 : i]
        if found[j] == GLOBAL or (found[j] == LOCAL and local) or (found[j] == SLIDING and i - j < window):
            seen.append(j)
    return seen


def loops(module: NAtS, x: Tensor) -> Tensor:
    d, shared, rows = module.head_dim, module.heads // module.kv_heads, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    for i in range(len(x)):
        mixed = []
        for h in range(module.heads):
            g = h // shared
            seen = visible(kinds(module, x, g), i, module.window)
            scores = [math.exp(float(q[h][i] @ k[g][j]) / math.sqrt(d)) for j in seen]
            mixed.append(sum(s * v[g][j] for s, j in zip(scores, seen, strict=True)) / sum(scores))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize(("window", "kv_heads"), [(1, 4), (3, 2), (5, 1)])
def test_equals_loops(window: int, kv_heads: int) -> None:
    module = NAtS(16, 4, window=window, kv_heads=kv_heads).double().eval()
    x = torch.randn(2, 26, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)
    assert {kind for g in range(kv_heads) for kind in kinds(module, x[0], g)} == {GLOBAL, LOCAL, SLIDING}


def test_all_global_is_plain_attention() -> None:
    module, plain = NAtS(16, 4, window=2).double().eval(), Softmax(16, 4, causal=True).double()
    own = module.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    torch.nn.init.zeros_(module.kind_proj.weight)  # outside of training global is favoured
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_the_drawn_mask_is_hard_and_its_gradient_that_of_a_soft_one() -> None:
    module = NAtS(8, 1, window=2).double().train()
    x, seed = torch.randn(1, 7, 8, dtype=torch.float64), 5
    torch.manual_seed(seed)
    result = module(x, need_weights=True)
    logits = module.kind_proj(x)[0].detach().requires_grad_()
    torch.manual_seed(seed)
    drawn = torch.nn.functional.gumbel_softmax(logits[None, None], hard=True)[0, 0]
    found = [GLOBAL, *drawn.argmax(-1).tolist()[1:]]
    q, k, v = (p(x)[0] for p in (module.q_proj, module.k_proj, module.v_proj))  # type: ignore[misc]
    rows = []
    for i in range(7):
        total, mixed = torch.zeros((), dtype=x.dtype), torch.zeros(8, dtype=x.dtype)
        for j in range(i + 1):
            soft = [1.0, float(GLOBAL not in found[j + 1 : i]), float(i - j < 2)]
            gate = 1.0 if j == 0 else sum(drawn[j, c] * soft[c] for c in range(3))
            weight = gate * (q[i] @ k[j] / math.sqrt(8)).exp()
            total, mixed = total + weight, mixed + weight * v[j]
        rows.append(mixed / total)
        seen = visible(found, i, 2)
        assert (result.weights[0, 0, i] > 0).nonzero().flatten().tolist() == seen
    wanted = module.o_proj(torch.stack(rows))
    torch.testing.assert_close(result.output[0], wanted)
    (slope,) = torch.autograd.grad(wanted.square().sum(), logits, retain_graph=True)
    (ours,) = torch.autograd.grad(result.output.square().sum(), module.kind_proj.weight)
    torch.testing.assert_close(ours, slope.T @ x[0])


def test_the_loss_counts_what_is_kept() -> None:
    module = NAtS(8, 2, window=2).eval()
    with torch.no_grad():
        module.kind_proj.weight.zero_()
    assert module(torch.randn(1, 5, 8)).losses["sparsity"].item() == pytest.approx(0.5)


def test_the_kinds_send_no_gradient_into_the_tokens() -> None:
    module, x = NAtS(8, 2, window=2), torch.randn(1, 5, 8, requires_grad=True)
    assert torch.autograd.grad(module(x).losses["sparsity"], x, allow_unused=True)[0] is None


def test_refuses() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        NAtS(16, 4, window=0)


@pytest.mark.parametrize(("window", "kv_heads"), [(1, 4), (3, 2)])
def test_the_state_holds_what_a_later_token_can_see_and_no_more(window: int, kv_heads: int) -> None:
    module = NAtS(16, 4, window=window, kv_heads=kv_heads).double().eval()
    with torch.no_grad():  # random kinds of which few are global
        module.kind_proj.weight.copy_(torch.randn_like(module.kind_proj.weight))
        module.kind_proj.weight[::3] -= 0.4
    x = torch.randn(2, 60, 16, dtype=torch.float64) + 0.3
    state, outputs, widest = module.init_state(2), [], 0
    for n, token in enumerate(x.split(1, 1), start=1):
        outputs.append(module(token, state=state).output)
        held = state.fixed["places"], state.fixed["real"]
        wanted = [
            [[j for j in visible([*kinds(module, row[:n], g), SLIDING], n, window) if j < n] for g in range(kv_heads)]
            for row in x
        ]
        found = [[p[r].tolist() for p, r in zip(*pair, strict=True)] for pair in zip(*held, strict=True)]
        assert found == wanted
        widest = max(len(heads) for row in wanted for heads in row)
        assert state.fixed["keys"].shape == (2, kv_heads, widest, 4)
        assert state.nbytes == 2 * kv_heads * widest * (2 * 4 * 8 + 3 * 8 + 8 + 1) + 2
    torch.testing.assert_close(torch.cat(outputs, 1), module(x).output)
    assert widest < 60


def test_all_sliding_holds_a_window_and_the_first() -> None:
    module = NAtS(16, 4, window=4).eval()
    with torch.no_grad():
        module.kind_proj.weight.zero_()
        module.kind_proj.weight[SLIDING::3, 0] = 1.0
    x = torch.randn(1, 200, 16)
    x[..., 0] = 5.0
    for split in ([200], [1] * 200, [90, 7, 103]):
        state = module.init_state(1)
        for part in x.split(split, 1):
            module(part, state=state)
        assert state.fixed["places"][0, 0].tolist() == [0, 197, 198, 199]
