"""LAMB against its algorithm written as loops over numbers, and against AdamW where the trust ratio is one."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from manyheads.training import Lamb, lamb_groups

SHAPES = [(3, 4), (5,), (2, 3, 2)]


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]


def trained(make, steps: int = 5, scale: float = 1.0) -> list[Tensor]:
    parameters = [nn.Parameter(w) for w in drawn(0)]
    optimizer = make(parameters)
    for step in range(steps):
        for p, g in zip(parameters, drawn(step + 1, scale), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in parameters]


def by_hand(w: Tensor, gradients: list[Tensor], *, correct: bool, bounds: tuple[float, float] | None) -> Tensor:
    """One number after another."""
    lr, b1, b2, eps, decay = 0.02, 0.8, 0.95, 1e-6, 0.1
    values = w.flatten().tolist()
    m, v = [0.0] * len(values), [0.0] * len(values)
    for t, gradient in enumerate(gradients, start=1):
        u = []
        for i, g in enumerate(gradient.flatten().tolist()):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            mean, square = (m[i] / (1 - b1**t), v[i] / (1 - b2**t)) if correct else (m[i], v[i])
            u.append(mean / (math.sqrt(square) + eps) + decay * values[i])
        size = math.sqrt(sum(x * x for x in values))
        if bounds is not None:
            size = min(max(size, bounds[0]), bounds[1])
        ratio = size / math.sqrt(sum(x * x for x in u))
        values = [x - lr * ratio * step for x, step in zip(values, u, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view_as(w)


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("bounds", [None, (0.5, 2.0)])
def test_algorithm_two(correct: bool, bounds: tuple[float, float] | None) -> None:
    found = trained(
        lambda p: Lamb(p, 0.02, betas=(0.8, 0.95), weight_decay=0.1, bias_correction=correct, bounds=bounds)
    )
    steps = [drawn(step + 1) for step in range(5)]
    for i, (w, start) in enumerate(zip(found, drawn(0), strict=True)):
        assert_close(w, by_hand(start, [step[i] for step in steps], correct=correct, bounds=bounds))


def test_without_adaptation_it_is_adamw() -> None:
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    assert_close(trained(lambda p: Lamb(p, adapt=False, **options)), trained(lambda p: torch.optim.AdamW(p, **options)))


def test_the_scale_of_a_gradient_does_not_count() -> None:
    small, large = (trained(lambda p: Lamb(p, eps=0.0), scale=scale) for scale in (1e-3, 1e3))
    assert_close(small, large)


def test_zeros_have_ratio_one() -> None:
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    still = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Lamb([w, still], 0.5, weight_decay=0.0, eps=0.0 + 1e-12)
    w.grad, still.grad = torch.ones_like(w), torch.zeros_like(still)
    optimizer.step()
    assert_close(w.detach(), torch.full_like(w, -0.5))
    assert_close(still.detach(), torch.ones_like(still))


def test_training_goes_on_from_a_saved_state() -> None:
    def stopped(parameters: list[nn.Parameter]) -> Lamb:
        first = Lamb(parameters, 0.02, bounds=(0.1, 10.0))
        for p, g in zip(parameters, drawn(9), strict=True):
            p.grad = g
        first.step()
        second = Lamb(parameters, 0.5)
        second.load_state_dict(first.state_dict())
        return second

    def whole(parameters: list[nn.Parameter]) -> Lamb:
        first = Lamb(parameters, 0.02, bounds=(0.1, 10.0))
        for p, g in zip(parameters, drawn(9), strict=True):
            p.grad = g
        first.step()
        return first

    assert_close(trained(stopped), trained(whole))


def test_groups_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    many, few = lamb_groups(model)
    assert [p.shape for p in many["params"]] == [(4, 4)]
    assert [p.shape for p in few["params"]] == [(4,), (4,)]
    assert few["weight_decay"] == 0.0
    assert not few["adapt"]
    model(torch.randn(3, 4)).square().sum().backward()
    before = model[0].weight.detach().clone()
    Lamb([many, few], 0.1).step()
    moved = (model[0].weight.detach() - before).norm() / before.norm()
    assert_close(moved, torch.tensor(0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": "1e-3"}, "lr='1e-3' was given; want a number"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"bounds": (2.0, 1.0)}, "low <= high"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_odd_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.ones(2))], **options)


def test_odd_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        Lamb([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        Lamb(table.parameters()).step()
