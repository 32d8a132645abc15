"""ShiftAddViT (arXiv:2306.06446): its attention as loops, and linear layers of shifts in language and vision models."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageClassification

from manyheads.convert.shifted import powers_of_two, settled, shifted
from manyheads.hosts.loading import load_model
from manyheads.testing import examine_mechanism
from manyheads.training.shiftadd import ShiftAdd

SUITE = [
    "card", "shapes", "dtype", "extreme", "round-trip", "weights", "gradients", "gradcheck", "batch", "padding",
    "left-padding", "all-padding", "dense-mask", "no-numbers-padded",
]  # fmt: skip


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_loops(module: ShiftAdd, x: Tensor) -> Tensor:
    """x [n, e] of real tokens, one value at a time."""
    n, h, d = len(x), module.heads, module.head_dim
    q, k, v = ((x @ p.weight.T).view(n, h, d) for p in (module.q_proj, module.k_proj, module.v_proj))
    bits = []
    for t in (q, k):
        unit = torch.stack([torch.stack([row / row.norm() for row in token]) for token in t])
        mean = sum(float(value) for value in unit.flatten()) / unit.numel()
        bits.append([[[1 if float(value) > mean else 0 for value in row] for row in token] for token in unit])
    mixed = torch.zeros(n, h, d, dtype=x.dtype)
    for head in range(h):
        for i in range(n):
            row = v[i, head] / 2
            for j in range(n):
                both = sum(a * b for a, b in zip(bits[0][i][head], bits[1][j][head], strict=True))
                row = row + both / math.pi * v[j, head]
            mixed[i, head] = row / row.norm()
            for t in range(-4, 5):
                if 0 <= i + t < n:
                    mixed[i, head] += module.taps[head, 0, t + 4] * v[i + t, head]
    return module.o_proj(mixed.flatten(1))


@pytest.mark.parametrize("n", [1, 3, 12])
@torch.no_grad()
def test_equals_loops(n: int) -> None:
    module, x = ShiftAdd(12, 3).double(), tokens(n)
    result = module(x, need_weights=True)
    values = module.v_proj(x).unflatten(-1, (3, 4)).transpose(1, 2)
    assert_close(module.o_proj((result.weights @ values).transpose(1, 2).flatten(-2)), result.output)
    for row in range(2):
        assert_close(module(x).output[row], by_loops(module, x[row]))
        assert_close(result.output[row], by_loops(module, x[row]))


@torch.no_grad()
def test_padding_anywhere_is_as_if_it_were_not_there() -> None:
    module, x = ShiftAdd(12, 3).double(), tokens(9)
    mask = torch.tensor([[j not in (0, 4, 8) for j in range(9)], [j < 7 for j in range(9)]])
    for more in ({}, {"need_weights": True}):
        found = module(x, mask=mask, **more).output
        for row in range(2):
            assert_close(found[row, mask[row]], by_loops(module, x[row, mask[row]]))


def test_the_gradient_goes_past_the_step() -> None:
    module = ShiftAdd(12, 3).double()
    module(tokens(5)).output.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in module.parameters())


def test_powers_of_two_are_the_nearest_by_logarithm() -> None:
    for bits in (3, 5):
        weights = torch.cat((torch.linspace(-2, 2, 401, dtype=torch.float64), torch.tensor([1e-9, -3e-5]).double()))
        for weight, found in zip(weights.tolist(), powers_of_two(weights, bits).tolist(), strict=True):
            if weight == 0:
                assert found == 0
                continue
            places = [2.0**-s for s in range(2 ** (bits - 1))]
            best = min(abs(math.log2(abs(weight) / place)) for place in places)
            assert math.copysign(1, found) == math.copysign(1, weight)
            assert abs(found) in places
            assert abs(math.log2(abs(weight) / abs(found))) == pytest.approx(best)
    assert_close(powers_of_two(powers_of_two(weights)), powers_of_two(weights), rtol=0, atol=0)


def test_a_model_of_shifts_computes_the_same_when_settled_and_learns_before() -> None:
    model = load_model().model
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        before = model(ids).logits
    made = shifted(model)
    loss = made(ids, labels=ids).loss
    loss.backward()
    layer = made.model.layers[0].mlp.up_proj
    assert float(layer.weight.grad.abs().sum()) > 0
    with torch.no_grad():
        stock, again = settled(made), made(ids).logits
        assert_close(stock(ids).logits, again, rtol=0, atol=0)
        assert_close(model(ids).logits, before, rtol=0, atol=0)
        assert (again - before).abs().max() > 0.1
    assert type(stock) is type(model)
    assert set(stock.state_dict()) == set(model.state_dict())
    for name, value in stock.state_dict().items():
        if "_proj." in name:
            assert torch.equal(value.abs().log2(), value.abs().log2().round()), name
        else:
            assert torch.equal(value, model.state_dict()[name]), name


def test_a_vision_transformer_too() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
        patch_size=4, num_channels=1,
    )  # fmt: skip
    model = AutoModelForImageClassification.from_config(config).eval()
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        made = shifted(model)
        found = settled(made)(image).logits
        assert_close(found, made(image).logits)
        assert (found - model(image).logits).abs().max() > 1e-5
    assert torch.equal(made.classifier.weight, model.classifier.weight)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="--bits 1: want 2 to 8"):
        shifted(torch.nn.Sequential(torch.nn.Linear(2, 2)), 1)
    with pytest.raises(ValueError, match="inside its layers"):
        shifted(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(ValueError, match="cannot be built with causal=True"):
        ShiftAdd(12, 3, causal=True)


def test_all_but_the_gradient_of_a_step_is_as_of_every_mechanism() -> None:
    failing = {finding.property for finding in examine_mechanism(ShiftAdd, properties=SUITE) if not finding.holds}
    assert failing == {"gradcheck"}
