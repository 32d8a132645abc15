"""A model that a trainer left in training, with dropout: it is measured and converted as it stands in eval, and every
part of it stays in the mode that it was in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.convert import Judge, Sizes, aligned, grouped, head_scores, latent, rorope
from manyheads.convert.rorope import key_moments
from manyheads.convert.saving import sample
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions

ROWS = [list(range(1, 40)), list(range(200, 240))]


def tiny(dropout: float) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, attention_dropout=dropout, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def distance(model: Any) -> Any:
    judge = Judge(Loaded(model, None, "it"), Questions(Loaded(model, None, "it")), Sizes(1, 64, 1, 160))
    return judge.distance(grouped(model, 1, align="first").train())


WAYS: dict[str, Callable[[Any], Any]] = {
    "scores": lambda model: head_scores(model, ROWS, "importance"),
    "ablation": lambda model: head_scores(model, ROWS, "ablation"),
    "aligned": lambda model: aligned(model, 2, ROWS).state_dict(),
    "moments": lambda model: key_moments(model, ROWS),
    "latent": lambda model: latent(model, 8, fold="auto", rope_dim=4, calibration=ROWS).state_dict(),
    "rorope": lambda model: rorope(model, calibration=ROWS).state_dict(),
    "distance": distance,
    "sample": lambda model: sample(model)["logits"],
}


@pytest.mark.parametrize("way", WAYS)
def test_dropout_has_no_say(way: str) -> None:
    # The first layer's keys would be the same: attention drops out behind them.
    model, still = tiny(0.9), tiny(0.0).eval()
    if way in ("latent", "rorope"):  # their own model has no place for dropout
        model, still = tiny(0.0), tiny(0.0).eval()
        model.model.layers[0].self_attn.attention_dropout = 0.9
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    torch.testing.assert_close(WAYS[way](model), WAYS[way](still))
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
