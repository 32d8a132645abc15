"""IA-RED2: interpreters by their equation, patches that leave as hidden ones, and what REINFORCE teaches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from manyheads.steer.method import Prompt, method
from manyheads.steer.thinning.iared import Interpreters, fit_interpreters, interpreted


def vit() -> transformers.ViTForImageClassification:
    torch.manual_seed(5)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3, image_size=24, patch_size=8,
        num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval().double()


PIXELS = torch.randn(3, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_importance_is_a_mean_of_sigmoids() -> None:
    torch.manual_seed(0)
    own = Interpreters(12, 3, [1]).double()
    states = torch.randn(2, 5, 12, dtype=torch.float64)
    found = own(0, states)
    for b in range(2):
        for j in range(1, 5):
            q, k = own.query[0](states[b, 0]), own.key[0](states[b, j])
            each = [torch.sigmoid(q[4 * h : 4 * h + 4] @ k[4 * h : 4 * h + 4] / math.sqrt(4)) for h in range(3)]
            assert_close(found[b, j - 1], sum(each[1:], each[0]) / 3)


def test_what_leaves_is_hidden_from_all_later_layers_in_rows_of_their_own() -> None:
    model = vit()
    torch.manual_seed(1)
    own = Interpreters(32, 4, [1, 2]).double()
    for layer in own.query:
        layer.weight.data *= 6
    with torch.no_grad(), interpreted(model, own) as maps:
        found = model(PIXELS).logits
    first = maps[0] > 0.5
    second = first & (maps[1] > 0.5)
    assert len({tuple(row.tolist()) for row in first}) == 3
    assert 0 < int(second.sum()) < int(first.sum()) < 27
    assert torch.equal(maps[1] > 0, first)
    hooks = []
    for number, stays in ((1, first), (2, second)):
        there = torch.cat([torch.ones(3, 1, dtype=torch.bool), stays], 1)
        seen = there[:, None, None].expand(-1, 1, 10, -1) | torch.eye(10, dtype=torch.bool)
        hooks.append(
            model.vit.layers[number].register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: ((args[0], seen), kwargs), with_kwargs=True
            )
        )
    with torch.no_grad():
        wanted = model(PIXELS).logits
    for hook in hooks:
        hook.remove()
    assert_close(found, wanted)
    for row in range(3):
        with torch.no_grad(), interpreted(model, own):
            assert_close(model(PIXELS[row : row + 1]).logits, found[row : row + 1])


def test_reinforce_lets_leave_what_the_class_does_not_need(tmp_path: Path) -> None:
    model = vit()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with torch.no_grad():
        labels = model(PIXELS).logits.argmax(-1)
    torch.manual_seed(3)
    own = Interpreters(32, 4, [1]).double()
    history = fit_interpreters(model, own, [(PIXELS, labels)] * 30, learning_rate=4e-3)
    rewards = [reward for reward, _ in history]
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Where a class is never right only the penalty is left, and nothing is learnt: reward and baseline are alike.
    untouched = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    assert {reward for reward, _ in fit_interpreters(model, own, [(PIXELS, labels + 7)] * 2, penalty=0.5)} == {-0.5}
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in own.state_dict().items())


def test_the_command_opens_it_and_neutral_is_the_model(tmp_path: Path) -> None:
    own, command = Interpreters(32, 4, [1]).double(), method("interpreted")
    save_file(own.state_dict(), tmp_path / "interpreters.safetensors")
    file = {"interpreters": str(tmp_path / "interpreters.safetensors"), "heads": 4, "before": "1"}
    model = vit()
    with torch.no_grad():
        wanted = model(PIXELS).logits
        with command.open(model, Prompt({}), **file, **command.neutral):
            assert torch.equal(model(PIXELS).logits, wanted)
        with interpreted(model, own):
            thin = model(PIXELS).logits
        with command.open(model, Prompt({}), **file):
            assert torch.equal(model(PIXELS).logits, thin)


def test_what_does_not_fit_is_refused() -> None:
    model, own = vit(), Interpreters(32, 4, [1]).double()
    with pytest.raises(ValueError, match="threshold"), interpreted(model, own, 1.0):
        pass
    with pytest.raises(ValueError, match="has 3"), interpreted(model, Interpreters(32, 4, [3])):
        pass
    for before in ([], [2, 1], [-1]):
        with pytest.raises(ValueError, match="ascending"):
            Interpreters(32, 4, before)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 3] = False

    def one_leaves(states: Tensor) -> Tensor:
        return torch.arange(9).expand(len(states), -1) / 10

    own.forward = lambda group, states: one_leaves(states)  # type: ignore[method-assign]
    with torch.no_grad(), interpreted(model, own), pytest.raises(ValueError, match="mask of its own"):
        model.vit(PIXELS, attention_mask=mask)
