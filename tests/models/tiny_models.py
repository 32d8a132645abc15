"""Tiny models around one mechanism."""

from __future__ import annotations

from typing import Any

import torch

from manyheads import card, list_attentions, mechanism_class
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM, ManyheadsForSeq2SeqLM

VOCAB = 29


def spec(name: str) -> dict[str, Any]:
    """The mechanism as its card's example has it, over sources of the model's own width."""
    return {"name": name, **{k: v for k, v in card(name).example.items() if k not in ("dim", "source_dim")}}


def tiny(*names: str, **settings: Any) -> ManyheadsConfig:
    sizes = {card(name).example.get("dim", 16) for name in names} or {16}
    assert len(sizes) == 1
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": sizes.pop(),
        "num_hidden_layers": max(2, len(names)),
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "layers": [spec(name) for name in names] or ["softmax"],
        "initializer_range": 1.0,
        "tie_word_embeddings": False,  # tied, and with random weights, every token predicts itself
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    return ManyheadsConfig(**{**values, **settings})


def randomised(model: Any) -> Any:
    """In float64, with noise on every parameter, so that no zero or identity initialisation hides a path."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def causal_lm(*names: str, **settings: Any) -> ManyheadsForCausalLM:
    return randomised(ManyheadsForCausalLM(tiny(*names, **settings)))


def seq2seq(cross: str, **settings: Any) -> ManyheadsForSeq2SeqLM:
    config = tiny(cross_layers=spec(cross), hidden_size=card(cross).example.get("dim", 16), is_encoder_decoder=True)
    return randomised(ManyheadsForSeq2SeqLM(ManyheadsConfig(**{**config.to_dict(), **settings})))


def of_tokens(pattern: str) -> list[str]:
    """What declares the pattern and needs nothing by name beside its tokens; of the others tells test_side_inputs."""
    return [
        name
        for name in list_attentions(pattern=pattern)
        if all(what.startswith("optional") for what in card(name).takes.values())
    ]


def single_source(name: str) -> bool:
    arguments: dict[str, Any] = {"dim": 16, "heads": 4, **card(name).example, "causal": True}
    return mechanism_class(name)(**arguments).sources == 1


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
