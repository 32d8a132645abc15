"""explain_text on every kind of model that reads text: what is asked of it by default is what it can have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import COMMON
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from zoo import BOTH, WIDE

from manyheads.explain.attributions import METHODS
from manyheads.explain.explanation import explain_text
from manyheads.hosts.loading import Loaded

BYTES = {"vocab_size": 256}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {**COMMON, **BYTES}),
    "t5": (AutoModelForSeq2SeqLM, {**T5, **BYTES}),
    "bart": (AutoModelForSeq2SeqLM, {**BOTH, **BYTES, "max_position_embeddings": 64}),
    "bert": (AutoModelForSequenceClassification, {**WIDE, **BYTES, "num_labels": 3}),
    "qwen2": (AutoModelForSequenceClassification, {**COMMON, **BYTES, "num_labels": 3}),
    "roberta": (
        AutoModelForSequenceClassification,
        {**WIDE, **BYTES, "max_position_embeddings": 12, "pad_token_id": 1},
    ),
}


def loaded(kind: str) -> Loaded:
    auto, settings = MODELS[kind]
    torch.manual_seed(4)
    model: nn.Module = auto.from_config(AutoConfig.for_model(kind, **settings)).eval()
    return Loaded(model, None, kind)


@pytest.mark.parametrize("kind", MODELS)
def test_by_default(kind: str) -> None:
    own = loaded(kind)
    report = explain_text(own, "tell me", heads=False).report
    values = report["attributions"]["values"]
    assert all(len(row) == 7 for row in values.values())
    assert {"relevance", "rollout"} <= set(values)
    assert ("logit-flow" in values) == (kind == "llama")
    assert report["target"] == report["answer"][0]["id"]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_model_that_writes_another_text_is_asked_for_its_first_token(kind: str) -> None:
    own = loaded(kind)
    found = explain_text(own, "tell me", heads=False, methods=["relevance"], target="A")
    start = own.model.config.decoder_start_token_id
    batch = {"input_ids": torch.tensor([list(b"tell me")]), "decoder_input_ids": torch.tensor([[start]])}
    with torch.no_grad():
        wanted = own.model(**batch).logits[0, -1].softmax(-1)
    best = found.report["answer"][0]
    assert best["id"] == int(wanted.argmax())
    assert best["name"] == own.tokens([best["id"]])[0]
    assert found.report["target"] == ord("A")
    assert "'A'" in found.note
    values = METHODS["relevance"](own.model, None).attribute(batch, ord("A"))["encoder"][0]
    given = torch.tensor(found.report["attributions"]["values"]["relevance"])
    assert_close(given, values, atol=1e-5, rtol=0)


def test_a_writer_that_has_nothing_to_begin_by_is_refused() -> None:
    own = loaded("t5")
    own.model.config.decoder_start_token_id = own.model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        explain_text(own, "tell me", heads=False)


@pytest.mark.parametrize("count", [11, 12, 13])
def test_positions_that_are_kept_for_padding_are_nobodys(count: int) -> None:
    """RoBERTa's table of 12 has room for 10 tokens."""
    own = loaded("roberta")
    with pytest.raises(ValueError, match="positions"):
        explain_text(own, "a" * count, heads=False, methods=["rollout"])
    with pytest.raises(ValueError, match="positions"):
        METHODS["rollout"](own.model, None).attribute(torch.full((1, count), 97))
    assert len(explain_text(own, "a" * 10, heads=False, methods=["rollout"]).report["tokens"]) == 10


def test_half_a_character_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        explain_text(loaded("bert"), "caf\udce9", heads=False)
