"""Models that look at the name of their attention, or that the library runs by eager alone, are under a tap what they
are without: sparse layers see the keys that they chose, masks are those that the rest of the model adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import COMMON, prompt, tiny
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from zoo import BOTH, PICTURE, WIDE

from manyheads.hosts.taps import record

LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
}  # fmt: skip
SHARED = {
    "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61,
    "global_head_dim": 8, "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip


def made(kind: str, auto: Any, **settings: Any) -> Any:
    torch.manual_seed(3)
    model = auto.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_a_sparse_layer_sees_the_keys_that_it_chose(kind: str) -> None:
    common = {key: own for key, own in COMMON.items() if key != "head_dim"}
    model = made(kind, AutoModelForCausalLM, **{**common, **LATENT})
    ids, mask = prompt(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        with record(model) as calls:
            given = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        maps = model(ids, attention_mask=mask, output_attentions=True).attentions
    real = mask > 0
    assert_close(given[real], wanted[real], atol=1e-5, rtol=1e-5)
    for call, own in zip(calls, maps, strict=True):
        assert_close(call.weights().transpose(1, 2)[real], own.transpose(1, 2)[real], atol=1e-6, rtol=0)
    assert int((calls[0].weights()[0] > 0).sum(-1).max()) == 4


@pytest.mark.parametrize("kind", ["nllb-moe", "pegasus_x", "bigbird_pegasus"])
def test_both_halves_of_a_model_that_the_library_runs_by_eager_alone(kind: str) -> None:
    experts = {"num_experts": 2} if kind == "nllb-moe" else {}
    model = made(kind, AutoModel, **BOTH, **experts, max_position_embeddings=64)
    batch = {"input_ids": prompt(2, 11), "decoder_input_ids": prompt(2, 7, seed=2), "use_cache": False}
    with torch.no_grad():
        model(**batch)  # BigBird leaves its blocks for short texts once and for all
        wanted = model(**batch).last_hidden_state
        with record(model) as calls:
            given = model(**batch).last_hidden_state
    assert_close(given, wanted, atol=1e-4, rtol=1e-4)
    causal = next(call for call in calls if (call.site.stack, call.site.kind) == ("decoder", "self"))
    assert float(causal.weights().triu(1).abs().max()) == 0


def test_the_text_of_a_model_whose_pictures_alone_can_be_tapped() -> None:
    vision = {**WIDE, **PICTURE, "model_type": "git_vision_model"}
    model = made("git", AutoModel, **WIDE, vocab_size=61, vision_config=vision)
    batch = {"input_ids": prompt(2, 11), "pixel_values": torch.rand(2, 3, 16, 16)}
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        with record(model) as calls:
            given = model(**batch).last_hidden_state
    assert {call.site.stack for call in calls} == {"vision"}
    assert_close(given, wanted, atol=1e-4, rtol=1e-4)


def test_fewer_queries_than_keys_are_the_last_ones() -> None:
    """Layers that share keys drop the queries whose logits nobody asked for."""
    model, ids = made("gemma4_text", AutoModelForCausalLM, **{**COMMON, **SHARED}), prompt(2, 11)
    with torch.no_grad():
        wanted = model(ids, logits_to_keep=3).logits
        with record(model) as calls:
            given = model(ids, logits_to_keep=3).logits
    assert calls[-1].query.shape[2] == 3
    assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert float(calls[-1].weights().triu(9).abs().max()) == 0


@pytest.mark.parametrize("name", ["sinks", "block_indices"])
def test_what_changes_the_weights_and_is_not_known_is_refused(name: str) -> None:
    model, ids = tiny("llama"), prompt(1, 5)
    with torch.no_grad(), pytest.raises(ValueError, match=name), record(model):
        model(ids, **{name: torch.zeros(1, 4, 5, 1)})
    assert model.config._attn_implementation == "eager"
