"""Losses that transformers' Trainer computes itself, beside the model's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import causal_lm, randomised, tiny, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from manyheads.models import (
    ManyheadsForCausalLM,
    ManyheadsForNodeClassification,
    ManyheadsForSemanticSegmentation,
    ManyheadsForSequenceClassification,
    ManyheadsForTokenClassification,
)


def smoothed(model: Any, folder: Path, batch: dict[str, Any]) -> Any:
    arguments = TrainingArguments(output_dir=str(folder), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    return Trainer(model=model, args=arguments).compute_loss(model, dict(batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_smoothed_labels_are_shifted(tmp_path: Path) -> None:
    """As for transformers' own language models, which Trainer knows by the names of their classes."""
    model, ids = causal_lm("softmax"), tokens(2, 7)
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    wanted = F.cross_entropy(model(ids).logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten(), label_smoothing=0.1)
    batch = {"input_ids": ids, "labels": labels}
    assert_close(smoothed(model, tmp_path, batch), wanted)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).double()
    assert_close(smoothed(adapted, tmp_path, batch), wanted)


def stepped(model: Any, folder: Path, rows: list[Any], accumulated: int) -> Any:
    """After one step of gradient descent on all rows, in so many batches."""
    model = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=len(rows) // accumulated,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return dict(model.named_parameters())


IMAGES = {"image_size": 4, "patch_size": 2, "num_channels": 1, "positions": "learned"}
HEADS: dict[str, Any] = {
    "text": lambda: ManyheadsForCausalLM(tiny("softmax")),
    "one label": lambda: ManyheadsForSequenceClassification(tiny("softmax", num_labels=3)),
    "labels": lambda: ManyheadsForSequenceClassification(
        tiny("softmax", num_labels=3, problem_type="multi_label_classification")
    ),
    "tokens": lambda: ManyheadsForTokenClassification(tiny("softmax", num_labels=3)),
    "pixels": lambda: ManyheadsForSemanticSegmentation(tiny("softmax", num_labels=3, **IMAGES)),
    "nodes": lambda: ManyheadsForNodeClassification(tiny("softmax", num_labels=3, num_node_features=2)),
}


def asked(head: str, row: int) -> dict[str, Any]:
    """A row that asks for other numbers of labels than the next."""
    draw = torch.Generator().manual_seed(row)
    if head == "pixels":
        labels = torch.randint(3, (4, 4), generator=draw)
        labels[row:] = -100
        return {"pixel_values": torch.rand(1, 4, 4, generator=draw).double(), "labels": labels}
    labels = torch.randint(3, (6,), generator=draw).masked_fill(torch.arange(6) > row, -100)
    if head == "nodes":
        edges = torch.randint(6, (2, 9), generator=draw)
        return {"node_features": torch.rand(6, 2, generator=draw).double(), "edges": edges, "labels": labels}
    labels = {"one label": labels[0], "labels": labels[:3].clamp(min=0).double()}.get(head, labels)
    return {"input_ids": tokens(6, seed=row), "labels": labels}


@pytest.mark.parametrize("head", HEADS)
def test_a_step_over_several_batches_is_that_over_one(head: str, tmp_path: Path) -> None:
    """Every label counts alike, whatever batch it is in: the models are told how many there are."""
    model, rows = randomised(HEADS[head]()), [asked(head, row) for row in range(1, 5)]
    assert_close(stepped(model, tmp_path, rows, 4), stepped(model, tmp_path, rows, 1))


def test_pixels_share_what_a_router_loses_too() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = randomised(ManyheadsForSemanticSegmentation(tiny("softmax", num_labels=3, **experts, **IMAGES)))
    row = {name: value[None] for name, value in asked("pixels", 2).items()}
    assert_close(3 * model(**row, num_items_in_batch=24).loss, model(**row).loss)


def test_labels_of_another_shape_are_refused() -> None:
    """Laid the other way they are as many, and would be asked of other tokens."""
    with pytest.raises(ValueError, match=r"labels \[7, 2\] for \[2, 7\] tokens; want one for each"):
        causal_lm("softmax")(tokens(2, 7), labels=tokens(7, 2))
