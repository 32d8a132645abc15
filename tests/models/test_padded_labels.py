"""Pixels and nodes that are padding: no label of theirs counts, and nothing that they hold reaches a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from manyheads.models import (
    ManyheadsConfig,
    ManyheadsForCausalLM,
    ManyheadsForNodeClassification,
    ManyheadsForSemanticSegmentation,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"stem": [{"features": 8, "kernel": 2, "stride": 2}], "stages": [{"dim": 8, "mixers": ["hilo"]}]}


def _pixels() -> tuple[Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = ManyheadsForSemanticSegmentation(ManyheadsConfig(stages=STAGES, num_labels=3)).double()
    real = torch.ones(2, 8, 10, dtype=torch.bool)
    real[1, :, 6:] = False
    given = {"pixel_values": torch.randn(2, 3, 8, 10).double(), "pixel_mask": real.long()}
    return model, given, real


def _nodes() -> tuple[Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    config = ManyheadsConfig(**SIZES, layers=["graph-layout", "softmax"], num_node_features=5, num_labels=3)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    given = {"node_features": torch.randn(2, 7, 5).double(), "edges": torch.randint(4, (2, 2, 9))}
    return ManyheadsForNodeClassification(config).double(), {**given, "attention_mask": real.long()}, real


@pytest.mark.parametrize("case", [_pixels, _nodes])
def test_a_label_of_what_is_padded_counts_nothing(case: Any) -> None:
    model, given, real = case()
    labels = torch.randint(3, real.shape)
    wanted = model(**given, labels=labels.masked_fill(~real, -100)).loss
    torch.testing.assert_close(model(**given, labels=labels).loss, wanted)
    torch.testing.assert_close(model(**given, labels=labels.masked_fill(~real, 77)).loss, wanted)
    both = [model(**given, labels=each, num_items_in_batch=40) for each in (labels, labels.masked_fill(~real, -100))]
    torch.testing.assert_close(both[0].loss, both[1].loss)


@pytest.mark.parametrize("case", [_pixels, _nodes])
def test_what_padding_holds_reaches_no_gradient(case: Any) -> None:
    model, given, real = case()
    name = "pixel_values" if "pixel_values" in given else "node_features"
    padded = (~real)[:, None].expand_as(given[name]) if name == "pixel_values" else (~real)[..., None]
    labels, grads = torch.randint(3, real.shape).masked_fill(~real, -100), []
    for value in (0.0, float("nan")):
        model.zero_grad()
        model(**{**given, name: given[name].masked_fill(padded, value)}, labels=labels).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_mark_of_nothing_asked_that_is_none_is_named() -> None:
    model, given, real = _pixels()
    for mark in (255, -1):
        with pytest.raises(ValueError, match=rf"{mark}.*want 0 to 2.*-100"):
            model(**given, labels=torch.full(real.shape, mark))
    with pytest.raises(ValueError, match=r"semantic_loss_ignore_index.*-100"):
        ManyheadsConfig(stages=STAGES, semantic_loss_ignore_index=255)
    words = ManyheadsForCausalLM(ManyheadsConfig(**SIZES, vocab_size=9))
    with pytest.raises(ValueError, match=r"9.*want 0 to 8.*-100"):
        words(torch.ones(1, 4, dtype=torch.long), labels=torch.full((1, 4), 9))


def test_labels_in_bytes_are_counted_as_what_they_are() -> None:
    """In a byte -100 is 156."""
    torch.manual_seed(0)
    model = ManyheadsForSemanticSegmentation(ManyheadsConfig(stages=STAGES, num_labels=200))
    pixels, labels = torch.randn(1, 3, 8, 10), torch.randint(200, (1, 8, 10))
    labels[:, :4] = 156
    torch.testing.assert_close(model(pixels, labels=labels.byte()).loss, model(pixels, labels=labels).loss)


def test_edges_are_numbers_of_nodes() -> None:
    model, given, _ = _nodes()
    with pytest.raises(ValueError, match="want integers"):
        model(given["node_features"], torch.ones(2, 2, 9, dtype=torch.bool))


@pytest.mark.parametrize("case", [_pixels, _nodes])
def test_one_label_is_there_or_not(case: Any) -> None:
    """As in transformers' segmentation; among one class a cross entropy is zero, and teaches nothing."""
    model, given, real = case()
    model.config.num_labels = 1
    model = type(model)(model.config).double()
    labels = torch.randint(2, real.shape)
    labels[0, 0] = -100
    out = model(**given, labels=labels)
    logits = out.logits[:, 0] if out.logits.ndim == 4 else out.logits[..., 0]
    asked = real & (labels != -100)
    wanted = binary_cross_entropy_with_logits(logits[asked], labels[asked].double())
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(model(**given, labels=labels, num_items_in_batch=30).loss, wanted * asked.sum() / 30)
    with pytest.raises(ValueError, match=r"255.*want 0 or 1.*-100"):
        model(**given, labels=torch.full(real.shape, 255))


@pytest.mark.parametrize("case", [_pixels, _nodes])
def test_a_mask_that_is_added_to_scores_is_refused(case: Any) -> None:
    """Zero for what is real and much less for what is not: taken for nonzero = real it says the contrary."""
    model, given, real = case()
    name = "pixel_mask" if "pixel_mask" in given else "attention_mask"
    wanted = model.eval()(**given).logits
    torch.testing.assert_close(model(**{**given, name: real.float()}).logits, wanted)
    with pytest.raises(ValueError, match=f"{name} .*below zero.*nonzero"):
        model(**{**given, name: torch.where(real, 0.0, -1e9)})
