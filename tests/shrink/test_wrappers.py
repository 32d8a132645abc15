"""A model inside PEFT's adapters or torch.compile is shrunk as the model alone, with what is around it at work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.shrink import H2O, Policy, SnapKV, StreamingLLM, release

# PEFT asks transformers for names that are leaving.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
POLICY = SnapKV(budget_tokens=8, window_size=3)
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}


def adapted(config: Any) -> Any:
    model = get_peft_model(tiny("llama"), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def told(model: Any, cache: Any, more: int = 3) -> Tensor:
    """Logits of a prompt and a few tokens, in calls of the model itself."""
    tokens, logits, start = prompt(2, 20 + more), [], 0
    for end in range(20, 21 + more):
        with torch.no_grad():
            out = model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        cache, start = out.past_key_values, end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("policy", [POLICY, H2O(budget_tokens=8), StreamingLLM(budget_tokens=8)], ids=repr)
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_adapters_act(kind: Any, policy: Policy) -> None:
    wrapped = adapted(kind(task_type="CAUSAL_LM"))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    plain = tiny("llama")
    given, wanted, bare = (told(own, policy.make_cache(own)) for own in (wrapped, merged, plain))
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)
    assert float((given - bare).abs().max()) > 1e-2
    release(wrapped)
    release(merged)
    with policy(wrapped) as active:
        text = wrapped.generate(input_ids=prompt(2, 20), **SETTINGS)
    with policy(merged) as alone:
        torch.testing.assert_close(merged.generate(prompt(2, 20), **SETTINGS), text)
    assert active.cache.lengths() == alone.cache.lengths()


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_learned_prompts_are_tokens_of_the_context_and_learned_prefixes_are_refused() -> None:
    wrapped = adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with POLICY(wrapped) as active:
        wrapped.generate(input_ids=prompt(2, 20), **SETTINGS)
    assert active.cache.get_seq_length() == 4 + 20 + 4
    assert active.cache.lengths() == [[8 + 4] * 2] * 3
    prefixed = adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"PREFIX_TUNING.*learned keys"):
        POLICY.make_cache(prefixed)
    with pytest.raises(ValueError, match=r"PREFIX_TUNING.*learned keys"), POLICY(prefixed):
        pass


def test_compiled_models_give_the_same() -> None:
    model = tiny("llama", num_hidden_layers=1)
    with POLICY(model) as active:
        wanted, text = told(model, None, 1), model.generate(prompt(2, 20), **SETTINGS)
    kept = active.cache.lengths()
    compiled = torch.compile(model, backend="eager")
    with POLICY(compiled) as active:
        torch.testing.assert_close(compiled.generate(prompt(2, 20), **SETTINGS), text)
        assert active.cache.lengths() == kept
        given = told(compiled, None, 1)
    torch.testing.assert_close(given, wanted)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager")
    with POLICY(model):
        torch.testing.assert_close(told(model, None, 1), wanted)
    torch._dynamo.reset()


def test_offloaded_weights() -> None:
    """They lie on no device between calls, and a family that is not tested is probed all the same."""
    settings = {name: own for name, own in tiny("llama").config.to_dict().items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **settings)).eval()
    policy = StreamingLLM(budget_tokens=12, positions="text")
    wanted = told(model, policy.make_cache(model))
    release(model)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    torch.testing.assert_close(told(offloaded, policy.make_cache(offloaded)), wanted)
