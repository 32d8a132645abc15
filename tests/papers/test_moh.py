"""MoH (arXiv:2410.11842) against loops over tokens and heads, in the form of the released ViT and DiT code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.mixing.moh import MoH
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.testing import check_mechanism


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def gates_of(module: MoH, x: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Gates of all heads for one token; probabilities and membership of the routed heads."""
    shared, k = module.shared_heads, module.active_heads
    first = [1.0] * shared
    if module.shared_router is not None:
        first = [shared * p for p in softmax((module.shared_router.weight @ x).tolist())]
    if module.router is None:
        return first, [], []
    probs = softmax((module.router.weight @ x).tolist())
    best = sorted(range(len(probs)), key=lambda r: -probs[r])[:k]
    total = sum(probs[r] for r in best)
    rest = [k * p / total if r in best else 0.0 for r, p in enumerate(probs)]
    if module.balance is not None:
        a, b = softmax((module.balance.weight @ x).tolist())
        first, rest = [2 * a * g for g in first], [2 * b * g for g in rest]
    return first + rest, probs, [float(r in best) for r in range(len(probs))]


def loops(module: MoH, x: Tensor) -> Tensor:
    n, d = len(x), module.head_dim
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    rows = []
    for i in range(n):
        gates, _, _ = gates_of(module, x[i])
        seen = range(i + 1 if module.causal else n)
        mixed = []
        for h, gate in enumerate(gates):
            shares = softmax([float(q[h][i] @ k[h][j]) / math.sqrt(d) for j in seen])
            mixed.append(gate * sum(w * v[h][j] for w, j in zip(shares, seen, strict=True)))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("shared", "active"), [(2, 3), (1, 2), (0, 4), (8, 0), (3, 5)])
def test_equals_loops(shared: int, active: int, causal: bool) -> None:
    module = MoH(16, 8, shared_heads=shared, active_heads=active, causal=causal).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x).output, torch.stack([loops(module, row) for row in x]))


@pytest.mark.parametrize(("shared", "active"), [(2, 3), (1, 2), (0, 4)])
def test_mean_gate_is_one_in_each_part(shared: int, active: int) -> None:
    module = MoH(16, 8, shared_heads=shared, active_heads=active).double()
    gates, _, mask = gates_of(module, torch.randn(16, dtype=torch.float64))
    weight = 2.0 if shared else 1.0
    assert sum(mask) == active
    a = sum(gates[:shared]) / shared if shared else 0.0
    assert a + sum(gates[shared:]) / active == pytest.approx(weight)


def test_zero_routers_with_all_heads_active_are_plain_attention() -> None:
    module, plain = MoH(16, 4, shared_heads=2, active_heads=2).double(), Softmax(16, 4).double()
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if name.endswith("proj.weight")})
    for linear in (module.router, module.shared_router, module.balance):
        assert linear is not None
        torch.nn.init.zeros_(linear.weight)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    result = module(x)
    torch.testing.assert_close(result.output, plain(x).output)
    torch.testing.assert_close(result.losses["balance"], torch.tensor(2.0, dtype=torch.float64))


def test_balance_loss_over_real_tokens() -> None:
    module = MoH(16, 8, shared_heads=2, active_heads=3).double()
    x, mask = torch.randn(2, 9, 16, dtype=torch.float64), torch.arange(9)[None] < torch.tensor([[9], [4]])
    found = [gates_of(module, x[b, i])[1:] for b in range(2) for i in range(9) if mask[b, i]]
    share = [sum(probs[r] for probs, _ in found) / len(found) for r in range(6)]
    load = [sum(member[r] for _, member in found) / len(found) for r in range(6)]
    wanted = 6**2 * sum(p * f for p, f in zip(share, load, strict=True)) / 6
    dirty = torch.where(mask[..., None], x, 1e3)
    torch.testing.assert_close(module(dirty, mask=mask).losses["balance"].item(), wanted)
    nothing = module(x, mask=torch.zeros_like(mask))
    assert nothing.losses["balance"].item() == 0
    assert MoH(16, 4, shared_heads=4)(x.float()).losses == {}


def test_heads_that_are_off_get_no_gradient() -> None:
    module = MoH(16, 4, shared_heads=0, active_heads=1).double()
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    module(x).output.sum().backward()
    (off,) = (torch.tensor(gates_of(module, x[0, 0])[0]) == 0,)
    norms = module.o_proj.weight.grad.unflatten(1, (4, 4)).abs().sum((0, 2))
    assert (norms[off] == 0).all()
    assert (norms[~off] > 0).all()


def test_defaults_keep_three_quarters_of_the_heads_on() -> None:
    for heads in (4, 8, 16):
        module = MoH(16, heads)
        assert module.shared_heads == heads // 4
        assert module.shared_heads + module.active_heads == heads * 3 // 4
    assert MoH(16, 1).active_heads == 1


@pytest.mark.parametrize(("shared", "active"), [(5, 0), (-1, 1), (2, 3), (2, 0), (4, 1)])
def test_refuses(shared: int, active: int) -> None:
    with pytest.raises(ValueError, match="shared_heads"):
        MoH(16, 4, shared_heads=shared, active_heads=active)


# -- the LLaMA form ----------------------------------------------------------------------------------------------------


def llama(shared: int | None, active: int | None, *, kv_heads: int = 2, causal: bool = True) -> MoH:
    return MoH(
        16, 8, shared_heads=shared, active_heads=active, routing="query-norm", kv_heads=kv_heads, causal=causal
    ).double()


def query_norm_loops(module: MoH, x: Tensor) -> tuple[Tensor, list[list[float]], list[list[bool]]]:
    """Outputs; probabilities and membership of the routed heads of every token."""
    n, d, group = len(x), module.head_dim, module.heads // module.kv_heads
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    rows, shares, members = [], [], []
    for i in range(n):
        norms = [math.sqrt(sum(e * e for e in q[h][i].tolist())) for h in range(module.shared_heads, module.heads)]
        mean = sum(norms) / len(norms)
        spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / (len(norms) - 1))
        probs = softmax([norm / spread for norm in norms])
        best = sorted(range(len(probs)), key=lambda r: -probs[r])[: module.active_heads]
        on = [True] * module.shared_heads + [r in best for r in range(len(probs))]
        seen, mixed = range(i + 1 if module.causal else n), []
        for h in range(module.heads):
            weights = softmax([float(q[h][i] @ k[h // group][j]) / math.sqrt(d) for j in seen])
            mixed.append(on[h] * sum(w * v[h // group][j] for w, j in zip(weights, seen, strict=True)))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
        shares.append(probs)
        members.append(on[module.shared_heads :])
    return torch.stack(rows), shares, members


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("shared", "active", "kv_heads"), [(4, 2, 2), (None, None, 1), (0, 3, 8), (5, 1, 4)])
def test_query_norm_equals_loops(shared: int | None, active: int | None, kv_heads: int, causal: bool) -> None:
    module = llama(shared, active, kv_heads=kv_heads, causal=causal)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        result = module.eval()(x)
        found = [query_norm_loops(module, row) for row in x]
        torch.testing.assert_close(result.output, torch.stack([output for output, _, _ in found]))
        torch.testing.assert_close(module.train()(x).output, result.output)
    shares, members = torch.tensor([f[1] for f in found]), torch.tensor([f[2] for f in found]).double()
    wanted = (shares.double().mean((0, 1)) * members.mean((0, 1))).mean() * (8 - module.shared_heads) ** 2
    torch.testing.assert_close(result.losses["balance"], wanted, rtol=1e-6, atol=1e-6)


def test_query_norm_has_the_parameters_of_a_llama_and_its_share_of_heads() -> None:
    module, plain = llama(None, None), Softmax(16, 8, causal=True, kv_heads=2).double()
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert (module.shared_heads, module.active_heads) == (4, 2)
    whole = llama(4, 4)
    plain.load_state_dict(whole.state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(whole(x).output, plain(x).output)
    everything_shared = llama(8, 0)
    plain.load_state_dict(everything_shared.state_dict())
    torch.testing.assert_close(everything_shared(x).output, plain(x).output)


def test_rotation_moves_no_query_norm() -> None:
    settings = {"shared_heads": 2, "active_heads": 2, "routing": "query-norm", "causal": True}
    module, turned = MoH(16, 8, **settings).double(), MoH(16, 8, rotary={}, **settings).double()
    turned.load_state_dict(module.state_dict())
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(turned(x, positions=torch.tensor([37])).output, module(x).output)


def test_a_gate_passes_its_gradient_straight_to_the_probabilities_in_training_only() -> None:
    module, x = llama(4, 2), torch.randn(1, 1, 16, dtype=torch.float64)
    # With one token the attention weights are one, so that queries matter through the gates alone.
    (module.eval()(x).output * torch.arange(16)).sum().backward()
    assert module.q_proj.weight.grad is None or (module.q_proj.weight.grad == 0).all()
    module.train()
    (module(x).output * torch.arange(16)).sum().backward()
    q = module.q_proj.weight.detach().clone().requires_grad_()
    norms = (q @ x[0, 0]).view(8, 2)[4:].norm(dim=-1)
    probs = (norms / norms.std()).softmax(-1)
    heads = module.v_proj(x)[0, 0].view(2, 2).repeat_interleave(4, 0)[4:]
    each = torch.einsum("hd,ehd->eh", heads, module.o_proj.weight.view(16, 8, 2)[:, 4:])
    (probs * (torch.arange(16).double() @ each)).sum().backward()
    torch.testing.assert_close(module.q_proj.weight.grad, q.grad)


def test_conformance_of_the_llama_form() -> None:
    check_mechanism(MoH, config={"routing": "query-norm", "kv_heads": 2, "rotary": {}})


def test_refuses_another_routing() -> None:
    with pytest.raises(ValueError, match="routing='norm'"):
        MoH(16, 4, routing="norm")
