"""transformers' own tests of models, over ours. Run by run.py, with the tests of the sdist on the path."""

from __future__ import annotations

import os
import unittest
from typing import Any

import models
import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from transformers.models.auto import modeling_auto as auto

# These tests know what a head is by the names in transformers' own tables.
for table, name in (
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ManyheadsForCausalLM"),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "ManyheadsForSeq2SeqLM"),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "ManyheadsForSequenceClassification"),
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "ManyheadsForTokenClassification"),
    (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "ManyheadsForImageClassification"),
):
    table["manyheads"] = name


class Tester:
    """What ModelTesterMixin asks of a model's tester."""

    is_training = True
    batch_size, seq_length = models.BATCH, models.TOKENS
    encoder_seq_length = decoder_seq_length = key_length = models.TOKENS

    def __init__(self, model: str, kind: str) -> None:
        self.model, self.kind = model, kind
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads, self.vocab_size = config.num_attention_heads, config.vocab_size
        if model == "image-classifier":
            rows, columns = config.patch_grid
            self.seq_length = self.encoder_seq_length = self.key_length = rows * columns

    def get_config(self) -> Any:
        return models.config(self.model, self.kind)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), models.inputs(self.model)


class Common(ModelTesterMixin):  # type: ignore[misc]
    model, kind = "", ""
    test_resize_embeddings = True
    test_torch_exportable = False

    def setUp(self) -> None:
        self.model_tester = Tester(self.model, self.kind)
        self.all_model_classes = models.MODELS[self.model]
        self.is_encoder_decoder = self.model == "seq2seq-lm"
        # transformers has a body to each configuration, and takes what these tables name for it.
        auto.MODEL_MAPPING_NAMES["manyheads"] = "ManyheadsSeq2SeqModel" if self.is_encoder_decoder else "ManyheadsModel"
        self.test_resize_embeddings = self.model != "image-classifier"


def _class(model: str, kind: str) -> type:
    generates = any(cls.can_generate() for cls in models.MODELS[model])
    bases = (Common, *[GenerationTesterMixin] * generates, unittest.TestCase)
    return type(f"Test_{model}_{kind}".replace("-", "_"), bases, {"model": model, "kind": kind})


def _classes() -> list[type]:
    kinds = os.environ["CLIENTS_KINDS"].split(",")
    return [_class(model, kind) for kind in kinds for model in models.MODELS if models.applies(model, kind)]


# In a function: a class that a loop leaves behind under a second name is collected a second time.
globals().update((made.__name__, made) for made in _classes())
