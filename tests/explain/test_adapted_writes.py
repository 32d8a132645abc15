"""What stands around the map that the heads write through belongs to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_families import prompt, tiny
from torch.testing import assert_close

from manyheads.explain.attributions import LogitFlow, ValueNorm

OUT = {"llama": "o_proj", "gpt2": "c_proj"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", OUT)
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_an_adapter_on_the_output_map_acts(kind: Any, family: str) -> None:
    own: dict[str, Any] = {"target_modules": [OUT[family]], "fan_in_fan_out": family == "gpt2"}
    own |= {"feedforward_modules": []} if kind is IA3Config else {"lora_dropout": 0.3}
    wrapped = get_peft_model(tiny(family).double(), kind(task_type="CAUSAL_LM", **own)).double().eval()
    torch.manual_seed(2)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    merged, batch = copy.deepcopy(wrapped).merge_and_unload(), {"input_ids": prompt(2, 9)}
    inner = wrapped.base_model.model
    assert_close(ValueNorm(inner, layer=0).attribute(batch), ValueNorm(merged, layer=0).attribute(batch))
    found, wanted = (LogitFlow(model).decompose(batch, target=5) for model in (inner, merged))
    assert_close(found.tokens, wanted.tokens)
    plain = LogitFlow(tiny(family).double()).decompose(batch, target=5)
    assert float((plain.tokens - wanted.tokens).abs().max()) > 1e-3


def test_a_hook_on_the_output_map_acts_and_one_that_is_no_linear_map_is_refused() -> None:
    hooked, scaled, batch = tiny("llama").double(), tiny("llama").double(), {"input_ids": prompt(2, 9)}
    for mine, theirs in zip(hooked.model.layers, scaled.model.layers, strict=True):
        mine.self_attn.o_proj.register_forward_hook(lambda module, args, output: 3 * output)
        theirs.self_attn.o_proj.weight.data.mul_(3)
    assert_close(ValueNorm(hooked).attribute(batch), ValueNorm(scaled).attribute(batch))
    hooked.model.layers[-1].self_attn.o_proj.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ValueError, match="no linear map"):
        ValueNorm(hooked).attribute(batch)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_in_bfloat16_is_a_linear_map_but_for_its_rounding() -> None:
    wrapped = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"])).eval()
    torch.manual_seed(2)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    merged, batch = copy.deepcopy(wrapped).merge_and_unload(), {"input_ids": prompt(2, 9)}
    wanted = ValueNorm(merged, layer=0).attribute(batch)
    found = ValueNorm(wrapped.base_model.model.bfloat16(), layer=0).attribute(batch)
    assert_close(found.float(), wanted, rtol=0.05, atol=0.05 * float(wanted.max()))
