"""Losses that transformers' Trainer computes itself, beside the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import causal_lm, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments


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
