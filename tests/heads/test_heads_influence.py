"""MoA's influence against its definition: renormalised masks one by one, and small masks in a whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel
from written_heads import random_llama

from manyheads.heads import Inputs, Span, influence
from manyheads.heads.influence import beyond, effects, of_sequence
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import tap


def test_effects_are_exact_for_a_linear_loss() -> None:
    """loss = sum of G A: mask every entry in turn, renormalise its row, and see what the loss does."""
    weights = torch.randn(2, 5, 7, dtype=torch.float64).softmax(-1)
    slope = torch.randn(2, 5, 7, dtype=torch.float64)
    found = effects(weights, slope)
    for h in range(2):
        for i in range(5):
            for j in range(7):
                masked = weights[h, i].clone()
                masked[j] = 0
                masked /= masked.sum()
                change = (slope[h, i] * (masked - weights[h, i])).sum()
                torch.testing.assert_close(found[h, i, j], change)


def test_an_only_entry_has_no_effect() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert effects(weights, torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist() == [[0.0, 0.0], [1.0, -1.0]]


def loss_of(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(input_ids=ids[None]).logits[0][labels], ids[1:][labels[:-1]])


@pytest.mark.parametrize("layer", [0, 2])
def test_influence_is_the_slope_of_masking_in_a_model(layer: int) -> None:
    """Weaken the entries beyond a span a little, renormalise, and measure the loss: each entry's slope at nothing
    masked is (1 - A_ij) E_ij, so entries weakened by a share s / (1 - A_ij) give the sum of E at the rate s."""
    # GPT-2, whose norms are in float64 too.
    config = GPT2Config(vocab_size=256, n_embd=24, n_layer=3, n_head=4, n_positions=32, initializer_range=0.3)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 256, (24,))
    labels = torch.zeros(24, dtype=torch.bool)
    labels[[9, 15, 22]] = True
    window, sinks, small = 5, 2, 1e-5
    found = of_sequence(model, ids, labels, [window], sinks)[0]
    for head in range(4):
        losses = []
        for share in (-small, small):

            def weaken(weights: Tensor, rows: slice, share: float = share, head: int = head) -> Tensor:
                hidden = beyond(rows, weights.shape[-1], window, sinks, weights.device)
                factor = 1 - share * hidden / (1 - weights)
                changed = weights * factor.nan_to_num(1)  # the first row's only weight is not hidden
                return changed / changed.sum(-1, keepdim=True)

            def read(call: object, edit: object = weaken, head: int = head) -> Tensor:
                return call.mix(edit, heads=[head])

            with torch.no_grad(), tap(model, read, layers=[layer]):
                losses.append(loss_of(model, ids, labels))
        slope = (losses[1] - losses[0]) / (2 * small)
        torch.testing.assert_close(found[layer, head].double(), slope, rtol=1e-4, atol=1e-7)


def test_spans() -> None:
    hidden = beyond(slice(3, 6), 6, 2, 1, torch.device("cpu"))
    assert hidden.int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    assert [Span(alpha=8, beta=0.25).at(n) for n in (8, 64)] == [10, 24]
    assert Span().at(100) == 1


def test_the_packaged_model_needs_layer_1_to_see_far(packaged: Loaded) -> None:
    spans = [Span(alpha=32), Span(beta=1.0)]
    found = influence(Inputs(packaged), spans=spans, lengths=(256, 384), sink_size=8, count=2)
    assert found.shape == (2, 2, 4, 8)
    # A span as long as the text hides nothing.
    assert not found[1].any()
    far = found[0, 1]
    assert int(far.argmax()) // 8 == 1
    assert far[1, :4].sum() > 5 * far[[0, 2, 3]].clamp_min(0).sum()


def test_weights_are_left_as_they_were() -> None:
    loaded = random_llama()
    loaded.model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in loaded.model.named_parameters()}
    loaded.model.train()
    influence(Inputs(loaded), spans=[Span(8)], lengths=(128,), sink_size=1, count=1)
    assert {name: p.requires_grad for name, p in loaded.model.named_parameters()} == before
    assert all(p.grad is None for p in loaded.model.parameters())
    assert loaded.model.training
