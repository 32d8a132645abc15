"""Thinning in models of other shapes, in prompts that end with their picture, with beams, in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from vision_hosts import IMAGE, WIDE, batch, llava

from manyheads.steer import boost, imbalance, vision_heads
from manyheads.steer.beliefs import pushed
from manyheads.steer.group_attention import group_attention
from manyheads.steer.thinning.aim import merge_and_prune
from manyheads.steer.thinning.exit import visual_exit
from manyheads.steer.thinning.mustdrop import must_drop
from manyheads.steer.thinning.tokens import text_layers, thinned
from manyheads.steer.thinning.vmtc import clustered

TEXT: dict[str, Any] = {
    **WIDE, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 70, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
TOWER: dict[str, Any] = {**WIDE, "num_hidden_layers": 2, "image_size": 24, "patch_size": 8, "vision_use_head": False}
GIVEN = {name: own for name, own in batch().items() if name != "position_ids"}
Opened = Callable[[Any], AbstractContextManager[Any]]


def made(config: Any) -> Any:
    torch.manual_seed(7)
    return transformers.AutoModelForImageTextToText.from_config(config).eval().double()


def gemma3() -> Any:
    text = transformers.Gemma3TextConfig(
        **TEXT, sliding_window=6, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"] * 2
    )
    vision = transformers.SiglipVisionConfig(**TOWER)
    return made(
        transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=9, image_token_index=IMAGE, boi_token_index=61
        )
    )


def paligemma() -> Any:
    vision = transformers.SiglipVisionConfig(**TOWER, projection_dim=32)
    return made(
        transformers.PaliGemmaConfig(
            vision_config=vision,
            text_config=transformers.GemmaConfig(**TEXT),
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
        )
    )


def qwen3() -> Any:
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, "mrope_interleaved": True}
    return made(
        transformers.Qwen3VLConfig(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, video_token_id=63
        )
    )


@contextmanager
def hidden(model: Any, picture: Tensor, first: int) -> Iterator[None]:
    """Keys of the picture seen by no other token from a layer on, in whatever masks the model makes."""

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n, mask = picture.shape[1], kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        mask = mask if mask.dtype == torch.bool else mask == 0
        alone = torch.eye(n, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask & (~picture[:, None, None] | alone)}

    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in text_layers(model)[first:]]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("make", [gemma3, paligemma])
def test_a_model_that_makes_its_layers_masks_itself(make: Callable[[], Any]) -> None:
    """Image tokens see each other both ways, in windows of their own."""
    model = make()
    kinds = (GIVEN["input_ids"] == IMAGE).long() if make is gemma3 else torch.zeros_like(GIVEN["input_ids"])
    given = {**GIVEN, "token_type_ids": kinds}
    picture, words = given["input_ids"] == IMAGE, given["attention_mask"].bool() & (given["input_ids"] != IMAGE)
    new = {"max_new_tokens": 3, "do_sample": False}
    plain = model.generate(**given, **new)
    with thinned(model, lambda step: None):
        assert torch.equal(model.generate(**given, **new), plain)
    with torch.no_grad(), hidden(model, picture, 2):
        wanted = model(**given).logits
    with torch.no_grad(), visual_exit(model, layer=2) as thinning:
        assert_close(model(**given).logits[words], wanted[words], atol=1e-8, rtol=1e-8)
        made_ = model.generate(**given, **new, return_dict_in_generate=True, output_logits=True)
    assert thinning.image_tokens == [[9, 9], [9, 9], [0, 0], [0, 0]]
    # Each token more is read behind the prompt, as one that only looks back.
    grown = torch.cat([given["input_ids"], made_.sequences[:, 15:17]], 1)
    more = torch.full((2, 2), int(make is paligemma))
    whole = {
        "input_ids": grown,
        "attention_mask": torch.cat([given["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1),
        "token_type_ids": torch.cat([kinds, more], 1),
        "pixel_values": given["pixel_values"],
    }
    with torch.no_grad(), hidden(model, grown == IMAGE, 2):
        wanted = model(**whole).logits[:, -3:]
    assert_close(torch.stack(made_.logits, 1).double(), wanted, atol=1e-5, rtol=1e-5)


def test_features_that_are_added_between_layers_and_packed_towers_are_named() -> None:
    model = qwen3()
    ids = torch.tensor([[1, 5, *[IMAGE] * 6, 7, 8]])
    given = {
        "input_ids": ids,
        "pixel_values": torch.randn(24, 96, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
    with torch.no_grad(), hidden(model, ids == IMAGE, 2):
        wanted = model(**given).logits[:, -2:]
    with torch.no_grad(), visual_exit(model, layer=2):
        assert_close(model(**given).logits[:, -2:], wanted, atol=1e-8, rtol=1e-8)
    for opened, message in (
        (visual_exit(model, layer=1), "adds what it sees .* before layer 2 at the earliest"),
        (merge_and_prune(model), "adds what it sees"),
        (must_drop(model, similarity=2.0), "patches of all pictures in one row"),
    ):
        with torch.no_grad(), opened, pytest.raises(ValueError, match=message):
            model(**given)


ALL: dict[str, Opened] = {
    "exit": lambda m: visual_exit(m, layer=2),
    "must_drop": lambda m: must_drop(m, 0.1, 0.2, similarity=0.2),
    "aim": lambda m: merge_and_prune(m),
    "clustered": lambda m: clustered(m, focused=0.5),
}


def test_a_picture_that_ends_the_prompt_is_looked_at_by_no_word_and_stays() -> None:
    model = llava()
    given = {"input_ids": torch.tensor([[1, 5, *[IMAGE] * 9]]), "pixel_values": GIVEN["pixel_values"][:1]}
    with torch.no_grad(), must_drop(model, 0.1, 0.2, similarity=2.0) as thinning:
        logits = model(**given).logits
        assert_close(logits, model(**given, use_cache=False).logits, atol=1e-8, rtol=1e-8)
    assert thinning.image_tokens == [[9]] * 4
    with torch.no_grad():
        assert_close(logits, model(**given).logits, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_beams_of_a_batch_are_those_of_each_row(name: str) -> None:
    model = llava()
    new = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with ALL[name](model):
        both = model.generate(**GIVEN, **new)
        for row in range(2):
            real = GIVEN["attention_mask"][row].bool()
            alone = {key: own[row : row + 1][:, real] for key, own in GIVEN.items() if key != "pixel_values"}
            found = model.generate(**alone, pixel_values=GIVEN["pixel_values"][row : row + 1], **new)
            assert torch.equal(both[2 * row : 2 * row + 2, -4:], found[:, -4:])


@pytest.mark.parametrize("name", ALL)
def test_gradients_with_checkpointing_are_those_without(name: str) -> None:
    labels = GIVEN["input_ids"].masked_fill(GIVEN["input_ids"] == IMAGE, -100)
    found = []
    for checkpointed in (False, True):
        model = llava().train()
        if checkpointed:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        with ALL[name](model):
            model(**GIVEN, labels=labels).loss.backward()
        found.append([own.grad for own in model.parameters() if own.grad is not None])
    assert len(found[0]) == len(found[1])
    for own, wanted in zip(found[1], found[0], strict=True):
        assert_close(own, wanted, atol=1e-8, rtol=1e-8)


PICTURE = GIVEN["input_ids"] == IMAGE
BY_PLACE: dict[str, Opened] = {
    "boost": lambda m: boost(m, [12, 13], 5.0),
    "pushed": lambda m: pushed(m, {(3, 0): torch.ones(8)}, 2.0, first=14),
    "vision_heads": lambda m: vision_heads(m, GIVEN),
    "imbalance": lambda m: imbalance(m, GIVEN, salient=PICTURE, gamma=1.0),
    "group_attention": lambda m: group_attention(m, [3, 4], [12]),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_places_of_tokens_that_moved_up_are_not_mistaken(name: str) -> None:
    model = llava()
    refused = pytest.raises(ValueError, match=f"{name} counts places of the text")
    with torch.no_grad(), BY_PLACE[name](model), visual_exit(model, layer=2), refused:
        model(**GIVEN)
    with torch.no_grad(), BY_PLACE[name](model):
        model(**GIVEN)
    # Below the layer that they leave before, places are the text's.
    with torch.no_grad(), boost(model, [12, 13], 5.0, heads=[(1, 0)]), visual_exit(model, layer=2):
        model(**GIVEN)
