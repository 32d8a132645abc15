"""A vision model that really sees: a tiny ViT trained on scikit-learn's digits, explained patch by patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from manyheads.explain.attributions import METHODS, compare_attributions, token_grid
from manyheads.hosts.taps import record


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Tensor, Tensor]:
    """The model, and images [300, 1, 8, 8] with their digits that it was not trained on."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(230):
        rows = torch.randint(0, len(images) - 300, (64,))
        loss = model(images[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval(), images[-300:], labels[-300:]


def test_it_reads_digits(trained: tuple[Any, Tensor, Tensor]) -> None:
    model, images, labels = trained
    with torch.no_grad():
        assert float((model(images).logits.argmax(-1) == labels).float().mean()) > 0.85


def test_weights_are_its_own(trained: tuple[Any, Tensor, Tensor]) -> None:
    model, images, _ = trained
    with torch.no_grad(), record(model) as calls:
        model(images[:4])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(images[:4], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    assert len(calls) == len(wanted) == 2
    for call, own in zip(calls, wanted, strict=True):
        torch.testing.assert_close(call.weights(), own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["relevance", "input-gradient", "integrated-gradients"])
def test_the_patches_that_count_are_found(trained: tuple[Any, Tensor, Tensor], method: str) -> None:
    """Taking the best patches away first lowers the answer's probability sooner than chance does."""
    model, images, _ = trained
    chosen = images[:12]
    with torch.no_grad():
        target = model(chosen).logits.argmax(-1)
    compared = compare_attributions(model, chosen, target, [method, "random"], steps=8)
    own, chance = compared.rows
    assert own.deletion < chance.deletion - 0.02
    assert own.correlation > chance.correlation + 0.1
    grid = token_grid(METHODS[method](model, None).attribute(chosen, target), model, chosen)
    assert grid.shape == (12, 4, 4)
