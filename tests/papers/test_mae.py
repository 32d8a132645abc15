"""Mixture of h - 1 heads (arXiv:2005.06537) against a sum over experts, and its block coordinate descent."""

import pytest
import torch
from torch import Tensor, nn

from manyheads.mechanisms.mixing.mae import BlockCoordinateDescent, MixtureOfAllButOne
from manyheads.mechanisms.plain.softmax import Softmax


def build(**config) -> MixtureOfAllButOne:
    module = MixtureOfAllButOne(12, 4, gate_dim=5, **config).double()
    with torch.no_grad():
        for parameter in module.gate.parameters():
            parameter.normal_()
    return module


def heads_of(module: MixtureOfAllButOne, x: Tensor, source: Tensor) -> list[Tensor]:
    """Each head's part of the output, W_o^j head_j, [n, dim]."""
    plain = Softmax(12, 4, causal=module.causal and source is x).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k.endswith("proj.weight")})
    weights = plain(x[None], None if source is x else source[None], need_weights=True).weights[0]
    v = (source @ module.v_proj.weight.T).split(3, 1)
    return [weights[h] @ v[h] @ module.o_proj.weight[:, 3 * h : 3 * h + 3].T for h in range(4)]


def by_experts(module: MixtureOfAllButOne, x: Tensor, source: Tensor) -> Tensor:
    heads, (first, _, second) = heads_of(module, x, source), module.gate
    rows = []
    for i in range(len(x)):
        mean = x[: i + 1].mean(0) if module.causal else x.mean(0)
        gates = (second.weight @ (first.weight @ mean + first.bias).tanh()).softmax(0)
        experts = [4 / 3 * sum(heads[j][i] for j in range(4) if j != e) for e in range(4)]
        rows.append(sum(g * expert for g, expert in zip(gates, experts, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(("causal", "cross"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_equals_the_sum_over_experts(causal: bool, cross: bool) -> None:
    module, x = build(causal=causal), torch.randn(2, 6, 12, dtype=torch.float64)
    context = torch.randn(2, 5, 12, dtype=torch.float64) if cross else None
    found = module(x, context).output
    for row in range(2):
        source = x[row] if context is None else context[row]
        wanted = by_experts(module, x[row], source) if cross else by_experts(module, row_of := x[row], row_of)
        torch.testing.assert_close(found[row], wanted)


@torch.no_grad()
def test_even_gates_are_multi_head_attention() -> None:
    module, x = build(), torch.randn(2, 6, 12, dtype=torch.float64)
    nn.init.zeros_(module.gate[2].weight)
    torch.testing.assert_close(module(x).output[0], sum(heads_of(module, x[0], x[0])))


@torch.no_grad()
def test_the_expert_phase_draws_by_the_gates() -> None:
    torch.manual_seed(0)
    module, x = build().train(), torch.randn(1, 3, 12, dtype=torch.float64)
    module.phase = "experts"
    heads = heads_of(module, x[0], x[0])
    experts = torch.stack([4 / 3 * (sum(heads) - head) for head in heads])
    found = module(x.expand(4000, -1, -1)).output
    gaps = (found[:, None] - experts[None]).abs().amax((2, 3))
    assert (gaps.amin(1) < 1e-9).all()
    drawn = torch.bincount(gaps.argmin(1), minlength=4) / 4000
    first, _, second = module.gate
    gates = (second.weight @ (first.weight @ x[0].mean(0) + first.bias).tanh()).softmax(0)
    torch.testing.assert_close(drawn.double(), gates, atol=0.04, rtol=0)
    module.eval()
    torch.testing.assert_close(module(x).output, build_like(module)(x).output)


def build_like(module: MixtureOfAllButOne) -> MixtureOfAllButOne:
    other = MixtureOfAllButOne(12, 4, gate_dim=5).double()
    other.load_state_dict(module.state_dict())
    return other


def test_block_coordinate_descent_trains_one_block_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([MixtureOfAllButOne(12, 4), nn.Linear(12, 12)])
    model[1].bias.requires_grad_(False)
    descent = BlockCoordinateDescent(model, every=3)
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01, weight_decay=0.1)
    x, target, phases = torch.randn(8, 5, 12), torch.randn(8, 5, 12), []
    for epoch in range(7):
        phases.append(descent.start_epoch(epoch))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss = (model[1](model[0](x).output) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        gates = {f"0.gate.{name}" for name in ("0.weight", "0.bias", "2.weight")}
        others = {name for name in before if not name.startswith("0.gate")} - {"1.bias"}
        assert changed == (gates if phases[-1] == "gates" else others)
    assert phases == ["gates", "experts", "experts"] * 2 + ["gates"]
    descent.finish()
    assert model[0].phase == "joint"
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.bias"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="heads=1"):
        MixtureOfAllButOne(12, 1)
    with pytest.raises(ValueError, match="'mae' modules"):
        BlockCoordinateDescent(nn.Linear(2, 2))
