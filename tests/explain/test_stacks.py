"""Models of several stacks: whose layers are meant is said, and never guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from manyheads.explain.attributions import METHODS, AttentionGradient, GradCAM, RawAttention, ValueNorm, leave_one_out
from manyheads.explain.detectors import detect
from manyheads.explain.views import read_store
from manyheads.hosts.taps import record, sites, tap
from manyheads.steer import (
    boost,
    calibrate,
    fit_offsets,
    juice,
    perturb,
    pick_heads,
    redistribute,
    scaled,
    steer,
)

WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
HALVES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}  # fmt: skip
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IMAGE = 60
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("AutoModelForImageTextToText", "llava", {
        "text_config": {"model_type": "llama", **WIDE, **WORDS}, "image_token_id": IMAGE,
        "vision_config": {"model_type": "clip_vision_model", **WIDE, **PICTURE},
    }),
    "qwen2_vl": ("AutoModelForImageTextToText", "qwen2_vl", {
        "text_config": {**WIDE, **WORDS, "num_key_value_heads": 2, "rope_parameters": ROTARY},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
                          "patch_size": 4},
        "image_token_id": IMAGE,
    }),
    "clip": ("AutoModel", "clip", {"text_config": {**WIDE, **WORDS}, "vision_config": {**WIDE, **PICTURE}}),
    "bart": ("AutoModelForSeq2SeqLM", "bart", {**HALVES, **WORDS}),
    "t5": ("AutoModelForSeq2SeqLM", "t5", {
        "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "vocab_size": 61,
        "decoder_start_token_id": 0, "relative_attention_num_buckets": 8,
    }),
    "whisper": ("AutoModelForSpeechSeq2Seq", "whisper", {
        **HALVES, **WORDS, "num_mel_bins": 8, "max_source_positions": 6, "decoder_start_token_id": 1,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }),
}  # fmt: skip
STACKS = {
    "llava": {("vision", "self"): 2, ("language", "self"): 2},
    "qwen2_vl": {("vision", "self"): 2, ("language", "self"): 2},
    "clip": {("vision", "self"): 2, ("language", "self"): 2},
    "bart": {("encoder", "self"): 2, ("decoder", "self"): 2, ("decoder", "cross"): 2},
    "t5": {("encoder", "self"): 2, ("decoder", "self"): 2, ("decoder", "cross"): 2},
    "whisper": {("encoder", "self"): 2, ("decoder", "self"): 2, ("decoder", "cross"): 2},
}


@cache
def built(name: str) -> Any:
    auto, kind, settings = MODELS[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, auto).from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.25)
    return model


def batch(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 59, (1, 8), generator=generator)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    if name == "llava":
        return {
            "input_ids": torch.cat([words[:, :2], torch.full((1, 16), IMAGE), words[:, 2:]], 1),
            "pixel_values": pixels,
        }
    if name == "qwen2_vl":
        ids = torch.cat([words[:, :2], torch.full((1, 4), IMAGE), words[:, 2:]], 1)
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": (ids == IMAGE).long()}  # fmt: skip
    if name == "clip":
        return {"input_ids": words, "pixel_values": pixels}
    if name == "whisper":
        return {"input_features": torch.randn(1, 8, 12, generator=generator), "decoder_input_ids": words}
    return {"input_ids": words, "decoder_input_ids": words[:, :5]}


def read(model: Any, name: str, inside: AbstractContextManager[None], stack: str) -> Tensor:
    """The outputs of one stack's self attention."""
    with inside, torch.no_grad(), record(model, stack=stack, kind="self") as calls:
        model(**batch(name))
    last = {call.layer: call.output.flatten() for call in calls}  # juice runs the model twice
    return torch.cat(list(last.values()))


@pytest.mark.parametrize("name", MODELS)
def test_stacks_are_known(name: str) -> None:
    assert Counter((site.stack, site.kind) for site in sites(built(name))) == STACKS[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use", [tap, record])
def test_a_layer_number_of_several_stacks_needs_one(name: str, use: Any) -> None:
    model = built(name)
    given = (model, lambda call: None) if use is tap else (model,)
    with (
        pytest.raises(ValueError, match=r"has a layer 1 in each of \w+, \w+: say which by stack="),
        use(*given, layers=[1]),
    ):
        pass
    for stack in dict.fromkeys(stack for stack, _ in STACKS[name]):
        with torch.no_grad(), record(model, layers=[1], stack=stack, kind="self") as calls:
            model(**batch(name))
        assert {(call.layer, call.site.stack) for call in calls} == {(1, stack)}


def test_older_names_of_the_language_stack() -> None:
    for name, older in (("llava", "decoder"), ("clip", "text")):
        with tap(built(name), lambda call: None, stack=older) as chosen:
            assert {site.stack for site in chosen} == {"language"}


Make = Callable[..., AbstractContextManager[None]]
OF_HEADS: dict[str, Make] = {
    "scaled": lambda model, **stack: scaled(model, {(0, 1): 0.0, (1, 2): 2.0}, **stack),
    "steer": lambda model, **stack: steer(model, {(1, 2): torch.ones(8)}, **stack),
    "juice": lambda model, **stack: juice(model, {(0, 1): 2.0}, **stack),
    "perturb": lambda model, **stack: perturb(model, 0.5, **stack),
    "perturb heads": lambda model, **stack: perturb(model, 0.5, heads=[(0, 1)], **stack),
}
OF_TEXT: dict[str, Make] = {
    "boost": lambda model, **stack: boost(model, slice(2, 5), 4.0, **stack),
    "boost heads": lambda model, **stack: boost(model, slice(2, 5), 4.0, heads=[(1, 1)], **stack),
    "calibrate": lambda model, **stack: calibrate(model, 0.2, alpha=1.1, **stack),
    "redistribute": lambda model, **stack: redistribute(
        model, slice(1, 6), 0.6, sink_dims=list(range(32)), threshold=2.0, centric=0.05, least=0.05, **stack
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", [*OF_HEADS, *OF_TEXT])
def test_an_intervention_changes_one_stack_alone(name: str, change: str) -> None:
    model, make = built(name), (OF_HEADS | OF_TEXT)[change]
    stacks = list(dict.fromkeys(stack for stack, _ in STACKS[name]))
    plain = {stack: read(model, name, tap(model, lambda call: None), stack) for stack in stacks}
    spoken = "language" if "language" in stacks else None
    if change in OF_HEADS or spoken is None:
        with pytest.raises(ValueError, match=r"attends in \w+, \w+: say which by stack="), make(model):
            pass
    else:
        assert_close(read(model, name, make(model), spoken), read(model, name, make(model, stack=spoken), spoken))
    for stack in stacks:
        if (name, stack, change) == ("qwen2_vl", "vision", "redistribute"):
            with pytest.raises(ValueError, match="no rows of tokens"):
                read(model, name, make(model, stack=stack), stack)
            continue
        changed = {other: read(model, name, make(model, stack=stack), other) for other in stacks}
        if change != "redistribute" or stack == spoken:
            assert not torch.equal(changed[stack], plain[stack])
        # What is read from does not know of what reads it.
        before = {"language": "vision", "decoder": "encoder"}.get(stack)
        if before in stacks:
            assert_close(changed[before], plain[before], atol=0, rtol=0)
        elif name == "clip":
            assert_close(changed["language"], plain["language"], atol=0, rtol=0)


def test_offsets_are_fitted_in_the_stack_that_is_said() -> None:
    model, ids = built("llava"), batch("llava")["input_ids"][:, -6:]
    heads = pick_heads(model, ids, ids, 2, steps=3)
    offsets = fit_offsets(model, ids, ids, heads, steps=10, lr=0.05, stack="language")
    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
        with steer(model, offsets, stack="language"):
            assert float(model(ids, labels=ids).loss) < before
    with pytest.raises(ValueError, match="say which by stack="):
        fit_offsets(model, ids, ids, heads)


@pytest.mark.parametrize("method", METHODS)
def test_attributions_of_llava_are_of_its_language_stack(method: str) -> None:
    model, given = built("llava"), batch("llava")
    if method in ("saliency", "input-gradient", "integrated-gradients"):
        with pytest.raises(ValueError, match="puts its pictures in the place of tokens"):
            METHODS[method](model, None).attribute(given, 5)
        return
    found = METHODS[method](model, None).attribute(given, 5)
    assert isinstance(found, Tensor)
    assert found.shape == (1, 24)
    # The same of the language model alone, on what it read.
    if method not in ("attention-gradient", "relevance", "rollout", "raw-attention"):
        return
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    hook.remove()
    alone = transformers.LlamaForCausalLM(model.config.text_config).eval()
    alone.model, alone.lm_head = model.model.language_model, model.lm_head
    assert_close(found, METHODS[method](alone, None).attribute({"inputs_embeds": seen[0]}, 5), atol=1e-6, rtol=1e-5)


def test_leave_one_out_of_llava_and_of_positions_in_several_dimensions() -> None:
    found = leave_one_out(built("llava"), batch("llava"), 5)
    assert found.shape == (1, 24)
    assert float(found[0, 2:18].abs().max()) > 1e-4  # tokens of the picture
    with pytest.raises(ValueError, match="in several dimensions"):
        leave_one_out(built("qwen2_vl"), batch("qwen2_vl"), 5)


@pytest.mark.parametrize("name", ["llava", "bart", "t5", "clip"])
def test_attributions_of_one_stack(name: str) -> None:
    model, given = built(name), batch(name)
    score = {"score": lambda out: out.logits_per_text.diagonal()} if name == "clip" else {}
    target = None if score else 5
    for stack in dict.fromkeys(stack for stack, _ in STACKS[name]):
        for make in (RawAttention, ValueNorm, GradCAM):
            found = make(model, layer=0, stack=stack, **score).attribute(given, target)
            assert isinstance(found, Tensor), (stack, make)
            assert float(found.abs().sum()) >= 0
        found = AttentionGradient(model, layers=[0], stack=stack, **score).attribute(given, target)
        with record(model, gradients=True, stack=stack, kind="self", layers=[0]) as calls:
            out = model(**given)
            (out.logits_per_text.diagonal().sum() if score else out.logits[0, -1, 5]).backward()
        wanted = (calls[0].weights() * calls[0].weight_gradients()).sum((1, 2)).detach()
        assert_close(found, wanted, atol=1e-6, rtol=1e-4)
        model.zero_grad()
    if name != "llava":  # its answer stands in one stack, which is then meant
        with pytest.raises(ValueError, match="there is one in each of"):
            RawAttention(model, layer=0, **score).attribute(given, target)
        with pytest.raises(ValueError, match="there is one in each of"):
            AttentionGradient(model, layers=[0], **score).attribute(given, target)


def test_stores_and_detectors_say_whose() -> None:
    model, given = built("llava"), batch("llava")
    with pytest.raises(ValueError, match="say which by stack="):
        read_store(model, given, layers=[0])
    assert read_store(model, given, layers=[0], stack="language").n == 24
    ids = given["input_ids"][:, -6:]
    assert detect(model, ["entropy"], inputs=ids).stack == "language"


@pytest.mark.parametrize("pictured", [True, False])
def test_positions_in_several_dimensions_are_the_models_own(pictured: bool) -> None:
    """Qwen2-VL finds them from the mask: a row that is padded on the left gives what the row alone gives."""
    model, alone = built("qwen2_vl"), batch("qwen2_vl")
    if not pictured:
        alone = {"input_ids": alone["input_ids"][:, -6:]}
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    texts = [name for name in ("input_ids", "mm_token_type_ids", "attention_mask") if name in alone]
    padded = alone | {name: nn.functional.pad(alone[name], (4, 0)) for name in texts}
    wanted = METHODS["relevance"](model, None).attribute(alone, 5)
    assert_close(METHODS["relevance"](model, None).attribute(padded, 5)[:, 4:], wanted, atol=1e-5, rtol=1e-4)
