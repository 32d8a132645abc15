"""TrMRL: a policy over a window of steps, against loops; its initialisation; and that memory is what it learns by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.training import EpisodicPolicy, play, policy_loss, train_on_bandits
from manyheads.training.episodic import Episodes


def looped(policy: EpisodicPolicy, steps: list[Tensor]) -> Tensor:
    """Of one window [k, inputs], its last step's logits, sum by sum."""
    weights = dict(policy.named_parameters())
    x = [weights["embed.weight"] @ step + weights["places"][j] for j, step in enumerate(steps)]
    dim, heads = len(x[0]), 2
    d = dim // heads
    for number in range(len(policy.layers)):
        own = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"layers.{number}.")}
        projected = [own["in_proj.weight"] @ one + own["in_proj.bias"] for one in x]
        read = []
        for i in range(len(x)):
            parts = []
            for h in range(heads):
                q = projected[i][h * d : (h + 1) * d]
                keys = [p[dim + h * d : dim + (h + 1) * d] for p in projected]
                values = [p[2 * dim + h * d : 2 * dim + (h + 1) * d] for p in projected]
                scores = [math.exp(float(q @ k) / math.sqrt(d)) for k in keys]
                parts.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
            read.append(own["out_proj.weight"] @ torch.cat(parts) + own["out_proj.bias"])
        x = [one + two for one, two in zip(x, read, strict=True)]
        inner = [(own["linear1.weight"] @ one + own["linear1.bias"]).clamp(min=0) for one in x]
        x = [one + own["linear2.weight"] @ two + own["linear2.bias"] for one, two in zip(x, inner, strict=True)]
    return weights["answer.weight"] @ x[-1] + weights["answer.bias"]


@torch.no_grad()
def test_each_step_answers_from_its_own_window() -> None:
    torch.manual_seed(0)
    policy = EpisodicPolicy(3, 2, dim=8, heads=2, layers=2, window=3, hidden=5).double()
    for parameter in policy.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    steps = torch.randn(2, 5, 3, dtype=torch.float64)
    found = policy(steps)
    for row in range(2):
        for t in range(5):
            wanted = looped(policy, list(steps[row, max(0, t - 2) : t + 1]))
            torch.testing.assert_close(found[row, t], wanted)


def test_the_initialisation_is_that_of_t_fixup_without_norms() -> None:
    torch.manual_seed(0)
    dim, depth = 64, 4
    policy = EpisodicPolicy(256, 2, dim=dim, heads=4, layers=depth, hidden=128)
    assert policy.embed.bias is None
    assert not [part for part in policy.modules() if "Norm" in type(part).__name__]
    assert float(policy.embed.weight.detach().std()) == pytest.approx(dim**-0.5 * (9 * depth) ** -0.25, rel=0.02)
    layer = policy.layers[0]
    scale = 0.67 * depth**-0.25
    for name, size, more in (("linear1", 192, 1.0), ("out_proj", 128, 1.0), ("in_proj", 256, 2**0.5)):
        bound = scale * more * math.sqrt(6 / size)
        assert float(getattr(layer, name).weight.abs().max()) == pytest.approx(bound, rel=0.02)


def test_returns_less_their_mean_weigh_what_was_done() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    chances = torch.tensor([[-0.5, -0.25, -1.0], [-2.0, -0.125, -0.75]], dtype=torch.float64)
    total = 0.0
    for t in range(3):
        returns = [sum(0.5 ** (s - t) * float(rewards[b, s]) for s in range(t, 3)) for b in range(2)]
        total -= sum(float(chances[b, t]) * (returns[b] - sum(returns) / 2) for b in range(2)) / 2
    nothing = torch.zeros(2, 3)
    found = policy_loss(Episodes(nothing, nothing, rewards, chances), discount=0.5)
    torch.testing.assert_close(float(found), total)


def test_a_step_shows_what_was_done_and_paid() -> None:
    policy = EpisodicPolicy(4, 3, dim=8, heads=2, layers=1)
    pays = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    played = play(policy, pays, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(played.rewards, pays.gather(1, played.actions))
    assert not played.steps[:, 0].any()
    torch.testing.assert_close(played.steps[:, 1:, :3].argmax(-1), played.actions[:, :-1])
    torch.testing.assert_close(played.steps[:, 1:, 3], played.rewards[:, :-1])
    alike = policy(played.steps).log_softmax(-1).gather(2, played.actions[..., None])[..., 0]
    torch.testing.assert_close(played.chances, alike)


def test_memory_finds_the_arm_that_pays() -> None:
    """Of two arms one pays: 0.5 a step without memory."""
    torch.manual_seed(0)
    made = {"dim": 16, "heads": 2, "layers": 1, "hidden": 16}
    remembers = train_on_bandits(EpisodicPolicy(3, 2, **made, window=4), updates=80, length=5)
    assert sum(remembers[-10:]) / 10 > 0.65


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: EpisodicPolicy(3, 2, dim=10, heads=4), "dim=10 is not divisible by heads=4"),
        (lambda: EpisodicPolicy(3, 2, window=0), "window=0; want at least 1"),
        (lambda: EpisodicPolicy(3, 2)(torch.zeros(2, 3)), r"steps of \[2, 3\]; want \[batch, steps, 3\]"),
        (lambda: train_on_bandits(EpisodicPolicy(4, 2)), "2 arms want a policy with inputs=3 and actions=2"),
        (lambda: train_on_bandits(EpisodicPolicy(3, 2), pays=0.0), "a chance above 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
