"""Families whose layers do more around the attention interface than others: read as they are, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import COMMON, prompt
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.explain.attributions import InputGradient, IntegratedGradients, LogitFlow, Rollout, Saliency
from manyheads.hosts.taps import record

COMPRESSING = {
    "num_key_value_heads": 1, "num_hidden_layers": 4, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2,
    "qk_rope_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 6, "sliding_window": 6,
}  # fmt: skip
CTRL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64, "vocab_size": 61, "pad_token_id": 0}


def made(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def newest(family: str, settings: dict[str, Any]) -> Any:
    """Of the families that came after the oldest release that is supported."""
    pytest.importorskip(f"transformers.models.{family}")
    return made(family, {**COMMON, **settings})


@torch.no_grad()
def test_a_layer_that_extends_its_mask_gets_the_mask_that_it_knows() -> None:
    """DeepSeek V4 puts a bias for compressed keys behind the mask, in the mask's own type: as bool it would say the
    opposite."""
    model, ids = newest("deepseek_v4", COMPRESSING), prompt(2, 13)
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    real, given = padding.bool(), {"input_ids": ids, "attention_mask": padding, "use_cache": False}
    wanted = model(**given, output_attentions=True)
    with record(model) as calls:
        assert_close(model(**given).logits[real], wanted.logits[real], atol=1e-4, rtol=1e-4)
    for call, own in zip(calls, wanted.attentions, strict=True):
        assert_close(call.weights().transpose(1, 2)[real], own.transpose(1, 2)[real], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="do not hand on one residual stream"):
        LogitFlow(model).attribute(given, 3)
    with record(model), pytest.raises(ValueError, match="caches keys of its own beside those of tokens"):
        model(ids)


def test_two_calls_of_one_look_are_not_two_layers() -> None:
    model, ids = newest("diffllama", {}), prompt(2, 9)
    with torch.no_grad(), record(model) as calls:
        model(ids)
    assert len(calls) == 2 * model.config.num_hidden_layers
    with pytest.raises(ValueError, match="DiffLlamaAttention attends with the same queries several times"):
        Rollout(model).attribute(ids, 3)


def test_what_a_model_writes_into_its_vectors_stays_its_own() -> None:
    """CTRL multiplies what it looked up in place."""
    model, ids = made("ctrl", CTRL).double(), prompt(2, 9)
    table = model.get_input_embeddings()
    vectors = table(ids).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs_embeds=vectors * 1).logits[:, -1, 3].sum(), vectors)
    assert_close(InputGradient(model).attribute(ids, 3), (slope * vectors).sum(-1).detach())
    assert_close(Saliency(model).attribute(ids, 3), slope.norm(dim=-1))
    with torch.no_grad():
        mean = table.weight.mean(0).expand(*ids.shape, -1)
        change = (model(ids).logits - model(inputs_embeds=mean * 1).logits)[:, -1, 3]
    found = IntegratedGradients(model, steps=64).attribute(ids, 3).sum(-1)
    assert_close(found, change, atol=1e-2, rtol=1e-2)
