"""LoRA of PEFT around every mechanism that a causal language model can hold: it learns, decodes and merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import causal_lm, of_tokens, randomised, tiny, tokens
from torch.testing import assert_close

from manyheads.models import ManyheadsForImageClassification

CAUSAL = of_tokens("causal-self")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(name: str, dtype: torch.dtype, *, strength: float, **settings: Any) -> Any:
    """Adapters that are not zero around every Linear of a model of one layer."""
    base = causal_lm(name, num_hidden_layers=1, intermediate_size=8, **settings).to(dtype)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    for key, value in model.named_parameters():
        if "lora_B" in key:
            value.data.mul_(strength)
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_it_learns_decodes_and_merges(name: str) -> None:
    model, ids = adapted(name, torch.float64, strength=3.0).double(), tokens(2, 12)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    for key, value in model.named_parameters():
        assert not value.requires_grad or (value.grad is not None and value.grad.any()), f"nothing reaches {key}"
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        whole = model(input_ids=found.sequences, use_cache=False).logits
        assert_close(torch.stack(found.logits, 1), whole[:, 11:-1].float())
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - out.logits).abs().max() > 1e-3
        merged = model.merge_and_unload()
        assert_close(merged(ids).logits, out.logits)
        assert_close(merged(found.sequences, use_cache=False).logits, whole)


@pytest.mark.parametrize("name", ["softmax", "mla", "titans", "hyena"])
def test_in_bfloat16(name: str) -> None:
    """PEFT keeps its adapters in float32 beside a model in bfloat16."""
    model, ids = adapted(name, torch.bfloat16, strength=0.3, initializer_range=0.1), tokens(2, 12)
    with torch.no_grad():
        first = model(input_ids=ids[:, :11], use_cache=True)
        step = model(input_ids=ids[:, 11:], past_key_values=first.past_key_values).logits[:, -1]
        whole = model(input_ids=ids).logits[:, -1]
        wanted = model.double()(input_ids=ids).logits[:, -1]
    for found in (step, whole):
        assert found.dtype == torch.bfloat16
        assert_close(found.double(), wanted, rtol=0.0, atol=0.05)


class Int8(torch.nn.Module):
    """A Linear with a weight in whole numbers."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", (100 * linear.weight.detach()).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


def test_what_is_around_the_embeddings_of_images_acts() -> None:
    config = tiny("softmax", image_size=6, patch_size=2, num_channels=1, positions="learned", is_causal=False)
    model = randomised(ManyheadsForImageClassification(config))
    pixels = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    plain = model(pixels).logits
    handle = model.get_submodule("stack.embed_positions").register_forward_hook(lambda part, given, out: 2 * out)
    assert (model(pixels).logits - plain).abs().max() > 1e-3
    handle.remove()
    wrapped = Int8(model.embed_patches)
    with torch.no_grad():
        model.embed_patches.weight.copy_(wrapped.weight / 100)
    wanted = model(pixels).logits
    model.embed_patches = wrapped
    assert_close(model(pixels).logits, wanted)
