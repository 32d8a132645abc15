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
