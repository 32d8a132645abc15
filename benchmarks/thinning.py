"""Image tokens that leave against the whole model: prefill time, decode time and held bytes of a Llama-shaped LLaVA.

12 layers, width 256, 4 heads on 2 of 64, float32, random weights, 1,024 image tokens and 32 words, batch 1. Half of the
image tokens leave before layer 2 (target: 0.6 of the prefill time at most), all leave before layer 2 or 6 (`exit`), or
as AIM's schedule says. Before anything is timed, what stays must equal the whole model with the keys of what leaves
hidden. The image's features are given as they come out of the projector, so that the tower, which is the same on both
sides, is not in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from common import device_argument, pair, save
from manyheads.steer.thinning.aim import merge_and_prune
from manyheads.steer.thinning.exit import visual_exit
from manyheads.steer.thinning.tokens import Step, Thinning, thinned

MEASURES = ("src/manyheads/steer/thinning",)

IMAGE, TOKENS, WORDS, LAYERS = 500, 1024, 32, 12


def model_of(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=2048,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=448, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config).eval()


def inputs(device: str) -> dict[str, Any]:
    words = torch.arange(WORDS, device=device)[None] + 7
    ids = torch.cat([words[:, :4], torch.full((1, TOKENS), IMAGE, device=device), words[:, 4:]], 1)
    features = torch.randn(TOKENS, 256, device=device, generator=torch.Generator(device).manual_seed(1))
    image = BaseModelOutputWithPooling(pooler_output=[0.02 * features])
    return {"input_ids": ids, "mm_encoder_outputs": {"image": image}, "logits_to_keep": 1}


def half(step: Step) -> torch.Tensor | None:
    return ~(step.image & (step.places % 2 == 0)) if step.layer == 2 else None


@contextmanager
def hidden(model: Any) -> Iterator[None]:
    """The whole model in which half the image's keys are hidden from layer 2 on."""
    n = TOKENS + WORDS
    places = torch.arange(n, device=model.device)
    gone = (places >= 4) & (places < 4 + TOKENS) & (places % 2 == 0)
    seen = ((places[:, None] >= places) & ~gone) | torch.eye(n, dtype=torch.bool, device=model.device)
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": seen[None, None]}), with_kwargs=True
        )
        for layer in model.model.language_model.layers[2:]
    ]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def check(model: Any, given: dict[str, Any]) -> None:
    with hidden(model):
        wanted = model(**given).logits
    with thinned(model, half):
        torch.testing.assert_close(model(**given).logits, wanted, atol=1e-4, rtol=1e-3)


WAYS: dict[str, Callable[[Any], AbstractContextManager[Thinning]]] = {
    "nothing leaves": lambda model: thinned(model, lambda step: None),
    "half before layer 2": lambda model: thinned(model, half),
    "all before layer 2": lambda model: visual_exit(model, layer=2),
    "all before layer 6": lambda model: visual_exit(model, layer=6),
    "merged twice, then pruned from layer 6 on": merge_and_prune,
}


@torch.no_grad()
def measured(model: Any, given: dict[str, Any], name: str, device: str) -> dict[str, Any]:
    def thin() -> Any:
        with WAYS[name](model) as block:
            return block, model(**given).past_key_values

    prefill = pair(thin, lambda: model(**given), rounds=5, device=device)
    block, cache = thin()
    whole = model(**given).past_key_values
    held, full = block.held_bytes, block.full_bytes

    def decode() -> None:
        with WAYS[name](model):
            steps(model, cache)

    decoding = pair(decode, lambda: steps(model, whole), rounds=5, device=device)
    return {
        "way": name, "prefill_ratio": prefill["ratio"], "prefill_ms": prefill["ours_ms"],
        "whole_ms": prefill["theirs_ms"], "held_share": held / full, "held_mb": held / 1e6,
        "decode_ratio": decoding["ratio"],
    }  # fmt: skip


def steps(model: Any, cache: Any, count: int = 16) -> None:
    """So many tokens one by one, taken back afterwards."""
    for token in range(count):
        model(input_ids=torch.tensor([[token]], device=model.device), past_key_values=cache)
    cache.crop(-count)


def main(device: str) -> None:
    model, given = model_of().to(device), inputs(device)
    check(model, given)
    save("thinning", device, [measured(model, given, name, device) for name in WAYS])


if __name__ == "__main__":
    main(device_argument())
