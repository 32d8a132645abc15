"""Gates against finite differences, ablation against weights that are really zero, pruning against every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from written_heads import planted, random_llama
from zoo import build, inputs

from manyheads import create_attention
from manyheads.explain.detectors import Importance, detect
from manyheads.hosts.loading import load_model
from manyheads.hosts.taps import record, tap


def gated(model: Any, layer: int, head: int, gate: float, ids: Tensor) -> float:
    """The loss with one head's output times the gate."""

    def read(call: Any) -> Tensor:
        output = call.output.clone()
        output[:, head] *= gate
        return output

    with torch.no_grad(), tap(model, read, layers=[layer]):
        return float(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_slopes_are_those_of_gates(family: str) -> None:
    # GPT-2 computes in float64 throughout; the others' norms round to float32.
    model = tiny(family)
    model, small, tolerance = (model.double(), 1e-5, 1e-6) if family == "gpt2" else (model, 5e-3, 2e-2)
    ids = prompt(2, 12)
    importance = Importance.of(model, inputs=ids)
    slopes = importance.slopes()
    heads = slopes.shape[2]
    for row in range(2):
        for layer in range(3):
            for head in range(heads):
                up, down = (gated(model, layer, head, 1 + step, ids[row : row + 1]) for step in (small, -small))
                assert float(slopes[row, layer, head]) == pytest.approx((up - down) / (2 * small), abs=tolerance)
    raw = importance.gradient(normalise=False)
    assert_close(raw, slopes.abs().mean(0))
    assert_close(importance.gradient(), raw / raw.square().sum(-1, keepdim=True).sqrt())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_slopes_per_token_are_the_code_of_the_paper() -> None:
    model, ids = tiny("gpt2").double(), prompt(1, 9)
    found = Importance.of(model, inputs=ids).slopes(per="token")[0]
    with record(model, gradients=True) as calls:
        cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
    for call in calls:
        output, grad = call.output.detach(), call.output.grad
        for head in range(4):
            own = sum(
                abs(sum(float(a * g) for a, g in zip(output[0, head, i], grad[0, head, i], strict=True)))
                for i in range(9)
            )
            assert float(found[call.layer, head]) == pytest.approx(own, rel=1e-6)


def projection(model: Any, layer: int) -> Tensor:
    return model.model.layers[layer].self_attn.o_proj.weight.data


def test_ablation_is_that_of_zeroed_weights() -> None:
    model, ids = tiny("llama"), prompt(2, 14)
    losses = lambda: sum(float(cross_entropy(model(row[None]).logits[0, :-1], row[1:])) for row in ids) / 2  # noqa: E731
    found = Importance.of(model, inputs=ids).ablation()
    with torch.no_grad():
        whole = losses()
        for layer in range(3):
            for head in range(4):
                kept = projection(model, layer).clone()
                projection(model, layer)[:, head * 8 : head * 8 + 8] = 0
                assert float(found[layer, head]) == pytest.approx(losses() - whole, abs=1e-5)
                projection(model, layer).copy_(kept)


def test_ablation_to_the_mean() -> None:
    """A head's mean over all rows and tokens takes the place of its output: loops over both."""
    model, ids = tiny("llama"), prompt(2, 10)
    importance = Importance.of(model, inputs=ids)
    with torch.no_grad(), record(model) as calls:
        model(ids)
    expected = calls[1].output.double().mean((0, 2))
    assert_close(importance.means()[1], expected, rtol=1e-4, atol=1e-6)

    def read(call: Any) -> Tensor:
        output = call.output.clone()
        output[:, 2] = expected[2].float()
        return output

    with torch.no_grad():
        whole = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        with tap(model, read, layers=[1]):
            changed = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(importance.ablation("mean")[1, 2]) == pytest.approx(float(changed - whole), abs=1e-5)
    # A head whose output is the same everywhere is its mean.
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:8] = 0
    assert float(Importance.of(model, inputs=ids).ablation("mean")[0, :2].abs().max()) < 1e-6


def test_pruning_by_loss_takes_the_cheapest_head_each_time() -> None:
    """Against a loop over every head that is left, by weights that are really zero."""
    model, ids = tiny("llama", num_hidden_layers=1), prompt(1, 14)
    found = Importance.of(model, inputs=ids).prune("loss")
    left, gone = [0, 1, 2, 3], []
    kept = projection(model, 0).clone()

    def loss(heads: list[int]) -> float:
        projection(model, 0).copy_(kept)
        for head in heads:
            projection(model, 0)[:, head * 8 : head * 8 + 8] = 0
        with torch.no_grad():
            return float(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))

    losses = [loss([])]
    while left:
        cheapest = min(left, key=lambda head: loss([*gone, head]))
        left.remove(cheapest)
        gone.append(cheapest)
        losses.append(loss(gone))
    assert found.order == [(0, head) for head in gone]
    assert found.losses == pytest.approx(losses, abs=1e-5)


def test_pruning_by_gradient_measures_again() -> None:
    model, ids = tiny("llama"), prompt(1, 14)
    importance = Importance.of(model, inputs=ids)
    found = importance.prune(at_once=0.25)
    assert found.each == 3
    assert len(set(found.order)) == 12
    assert len(found.losses) == 5
    first = importance.gradient().flatten()
    assert [layer * 4 + head for layer, head in found.order[:3]] == first.sort().indices[:3].tolist()
    again = importance.gradient(found.order[:3]).flatten()
    left = [i for i in again.sort().indices.tolist() if (i // 4, i % 4) not in found.order[:3]]
    assert [layer * 4 + head for layer, head in found.order[3:6]] == left[:3]
    ranks = found.ranks(3, 4)
    assert [float(ranks[head]) for head in found.order] == pytest.approx([i / 11 for i in range(12)])
    assert importance.prune(steps=1).order == found.order[:1]


def test_the_planted_pair_matters() -> None:
    """Only the token before (0.0) reaches what the planted model's residual keeps: it alone has a slope."""
    loaded = planted()
    ids = torch.randint(40, 90, (1, 30))

    def loss(output: Any, named: dict[str, Any]) -> Tensor:
        return output.logits[0].square().mean()

    with torch.no_grad():
        loaded.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(loaded.model.lm_head.weight))
    found = detect(loaded, ["gate", "ablation", "mean-ablation", "pruning"], inputs=ids, loss=loss)
    for name in ("gate", "ablation", "mean-ablation"):
        values = found[name].abs()
        assert float(values[0, 0]) > 1e-4
        values[0, 0] = 0
        assert float(values.max()) < 1e-6
    assert found.top("pruning", 1)[0][:2] == (0, 0)


def test_any_model_with_a_loss() -> None:
    """An encoder, a vision model and labels."""
    bert = detect(build("bert"), ["gate"], loss=lambda out, _: out.last_hidden_state[0, 0, 0].square(), length=24)
    assert_close(bert["gate"].norm(dim=-1), torch.ones(2))
    vit = detect(
        build("vit"), ["ablation"], loss=lambda out, _: out.last_hidden_state[0, 0, 0], inputs=inputs("vit", 2)
    )
    assert bool((vit["ablation"] != 0).all())
    batch = inputs("bart")
    batch["labels"] = batch["decoder_input_ids"]
    own = detect(build("bart"), ["gate"], inputs=batch, stack="encoder")
    assert bool((own["gate"] > 0).all())


def test_the_packaged_model_needs_its_first_layer() -> None:
    found = detect(load_model(), ["ablation", "gate"], length=128, count=1)
    assert found.top("ablation", 2)[0][:2] in [(0, 0), (0, 6)]
    assert_close(found["gate"].norm(dim=-1), torch.ones(4))


def test_what_cannot_be_done_is_told() -> None:
    model, ids = tiny("llama"), prompt(1, 8)
    with pytest.raises(ValueError, match="give loss="):
        Importance.of(build("bert"), inputs=ids)
    mechanism = create_attention("hedgehog", 16, 4, causal=True)
    with pytest.raises(ValueError, match="offers its weights and its output alone"):
        detect(mechanism, ["gate"], loss=lambda result, _: result.output.sum(), length=16, count=1)
    with pytest.raises(ValueError, match="one finite number"):
        Importance.of(model, lambda out, _: out.logits, inputs=ids).losses()
    importance = Importance.of(model, inputs=ids)
    for call, words in (
        (lambda: importance.slopes(per="row"), "per sample or per token"),
        (lambda: importance.ablation("none"), "to zero or to its mean"),
        (lambda: importance.prune("chance"), "by gradient or loss"),
        (lambda: importance.losses({(0, 9): None}), "heads 0 to 3"),
        (lambda: importance.losses({(7, 0): None}), "no such layers"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="give loss="):
        Importance.of(random_llama(num_hidden_layers=1), inputs=prompt(1, 1)).losses()
