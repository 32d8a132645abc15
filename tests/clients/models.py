"""The models that clients meet: four, each with any of eleven kinds of layers."""

from __future__ import annotations

from typing import Any

import torch

from manyheads import card
from manyheads.card import Pattern
from manyheads.models import (
    ManyheadsConfig,
    ManyheadsForCausalLM,
    ManyheadsForImageClassification,
    ManyheadsForSeq2SeqLM,
    ManyheadsForSequenceClassification,
    ManyheadsForTokenClassification,
    ManyheadsModel,
    ManyheadsSeq2SeqModel,
)

# Of each way to remember one: all keys and values, shared ones, latent ones, a window, chosen blocks, sparse weights,
# routed heads, a feature map, a recurrence, gates and a moving average, a long convolution.
KINDS = ("softmax", "gqa", "mla", "mswa", "moba", "entmax", "moh", "hedgehog", "aaren", "mega", "hyena")
MODELS: dict[str, tuple[type, ...]] = {
    "causal-lm": (ManyheadsForCausalLM, ManyheadsModel),
    "seq2seq-lm": (ManyheadsForSeq2SeqLM, ManyheadsSeq2SeqModel),
    "text-classifier": (ManyheadsForSequenceClassification, ManyheadsForTokenClassification),
    "image-classifier": (ManyheadsForImageClassification,),
}
VOCAB, BATCH, TOKENS = 99, 3, 7


def applies(model: str, kind: str) -> bool:
    """Whether a mechanism of this kind can stand in the model at all; its card says."""
    return model != "image-classifier" or Pattern.NONCAUSAL_SELF in card(kind).patterns


def config(model: str, kind: str, **settings: Any) -> ManyheadsConfig:
    own = {k: v for k, v in card(kind).example.items() if k != "dim"}
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": card(kind).example.get("dim", 32),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "layers": [{"name": kind, **own}],
        "image_size": 8,
        "patch_size": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "num_labels": 3,
        "is_encoder_decoder": model == "seq2seq-lm",
    }
    return ManyheadsConfig(**{**values, **settings})


def inputs(model: str) -> dict[str, torch.Tensor]:
    if model == "image-classifier":
        return {"pixel_values": torch.rand(BATCH, 3, 8, 8)}
    ids = torch.randint(3, VOCAB, (BATCH, TOKENS))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"decoder_input_ids": ids.clone()} if model == "seq2seq-lm" else {})
