"""Hierarchies: published models to the last parameter, padding as if the image ended there, refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from manyheads.models import ManyheadsConfig, ManyheadsForImageClassification, ManyheadsForSemanticSegmentation
from manyheads.models.presets import PRESETS, preset_config

# The numbers of the released code or of timm's, for 1,000 labels. spectformer_h_s is 22.2M in the paper, litv2_small
# 28M, halonet_h1 8.1M: their digits are added up from the released code, of HaloNet from timm's.
PUBLISHED = {
    "convit_tiny": 5_710_512,
    "davit_tiny": 28_360_168,
    "emo2_1m": 1_460_844,
    "emo2_2m": 2_384_312,
    "emo2_5m": 5_126_440,
    "focalnet_tiny_lrf": 28_647_928,
    "focalnet_tiny_srf": 28_427_116,
    "halonet_h1": 8_100_056,
    "litv2_small": 27_844_000,
    "mambaout_femto": 7_304_536,
    "mambaout_kobe": 9_141_208,
    "maxvit_tiny": 30_916_528,
    "nextvit_small": 31_763_368,
    "spectformer_h_s": 22_226_928,
    "twins_pcpvt_small": 24_106_216,
    "twins_svt_small": 24_060_776,
    "van_b0": 4_105_800,
    "volo_d1": 26_632_040,
}


# What heads a sixteenth of the features can have, and which two of the stages are tried: those that differ most.
HEADS = {
    "twins_svt_small": 2,
    "twins_pcpvt_small": 2,
    "maxvit_tiny": 2,
    "convit_tiny": 4,
    "nextvit_small": 4,
    "emo2_1m": 2,
}
HEADS |= {"emo2_2m": 2, "emo2_5m": 2, "volo_d1": 4}
TRIED = {name: slice(1, 3) for name in ("emo2_1m", "emo2_2m", "emo2_5m", "nextvit_small", "spectformer_h_s")}


def small(name: str) -> ManyheadsConfig:
    """The preset with an eighth of the features, two of its stages, and their first and last block."""
    layout = PRESETS[name]()
    layout["stages"] = layout["stages"][TRIED.get(name, slice(2))]
    heads = HEADS.get(name, 1)

    def narrow(wide: int) -> int:
        return max(wide // 8 // 4 * 4, 4)

    def less(spec: Any) -> Any:
        if isinstance(spec, str):
            return spec
        sizes = {"features": narrow, "heads": lambda _: heads, "height": lambda _: 5, "width": lambda _: 6}
        return {key: sizes[key](value) if key in sizes else value for key, value in spec.items()}

    for step in layout["stem"]:
        step["groups"] = narrow(step["features"]) if step.get("groups", 1) > 1 else 1
        step["features"] = narrow(step["features"])
    for stage in layout["stages"]:
        stage["dim"], stage["heads"] = narrow(stage["dim"]), heads
        stage["mixers"] = [less(stage["mixers"][0]), less(stage["mixers"][-1])]
        stage["depth"] = 2
        if stage.get("down"):
            stage["down"]["features"] = stage["dim"]
        if stage.get("positions"):
            stage["positions"] = [4, 5]
    head = layout["head"]
    head["hidden"] = head.get("hidden", 0) and 8
    if head.get("token"):
        head["token"]["heads"] = heads
    return ManyheadsConfig(stages=layout, num_labels=5)


def built(cls: Any, config: ManyheadsConfig) -> Any:
    torch.manual_seed(0)
    model = cls(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_as_many_parameters_as_published(name: str) -> None:
    with torch.device("meta"):
        model = ManyheadsForImageClassification(preset_config(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("cls", [ManyheadsForImageClassification, ManyheadsForSemanticSegmentation])
@torch.no_grad()
def test_a_padded_image_is_the_smaller_image(name: str, cls: Any) -> None:
    model = built(cls, small(name))
    image = torch.randn(2, 3, 44, 52).double()
    mask = torch.ones(2, 44, 52, dtype=torch.long)
    mask[1, 32:], mask[1, :, 40:] = 0, 0
    dirty = torch.where(mask[:, None] == 1, image, 100.0)
    together = model(dirty, pixel_mask=mask).logits
    torch.testing.assert_close(together[:1], model(image[:1]).logits)
    alone = model(image[1:, :, :32, :40]).logits
    found = together[1:] if cls is ManyheadsForImageClassification else together[1:, :, :32, :40]
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize(
    "name", ["van_b0", "twins_svt_small", "volo_d1", "nextvit_small", "convit_tiny", "litv2_small", "halonet_h1"]
)
def test_learns_checkpointed_as_without(name: str) -> None:
    found: list[list[Tensor]] = []
    for checkpointed in (False, True):
        model = built(ManyheadsForImageClassification, small(name)).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(torch.randn(2, 3, 32, 32).double(), labels=torch.tensor([1, 3])).loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)
        found.append([*grads, *model.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_states_are_the_maps_of_stages_and_weights_those_of_blocks() -> None:
    model = built(ManyheadsForImageClassification, small("twins_svt_small"))
    out = model(torch.randn(1, 3, 32, 32).double(), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(1, 8, 8, 8), (1, 4, 4, 16)]
    assert [w.shape[-1] for w in out.attentions] == [64, 64, 16, 16]
    plain = model(torch.randn(1, 3, 32, 32).double())
    assert plain.hidden_states is None
    assert plain.attentions is None


@pytest.mark.parametrize("name", ["mambaout_femto", "convit_tiny", "spectformer_h_s"])
def test_it_is_saved_and_opens_again(tmp_path: Path, name: str) -> None:
    model = built(ManyheadsForImageClassification, small(name))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    image = torch.randn(1, 3, 32, 32).double()
    torch.testing.assert_close(again(image).logits, model(image).logits)
    assert again.get_input_embeddings() is again.hierarchy.stem[0].conv


def test_segmentation_learns_to_copy_brightness() -> None:
    torch.manual_seed(0)
    layout = {"stem": [{"features": 8, "kernel": 2, "stride": 2}], "stages": [{"dim": 8, "mixers": ["hilo"]}]}
    model = ManyheadsForSemanticSegmentation(ManyheadsConfig(stages=layout, num_labels=2, num_channels=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        image = torch.rand(4, 1, 4, 4).round().repeat_interleave(4, 2).repeat_interleave(4, 3)
        out = model(image, labels=image[:, 0].long())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert float((out.logits.argmax(1) == image[:, 0]).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "at least one stage"),
        ([], "stages is"),
        ({"stem": [{"features": 4}], "stages": [{"dim": 4, "mixers": []}]}, r"stages\[0\].mixers"),
        ({"stem": [{"features": 4}], "stages": [{"dim": 4, "mixers": ["hilo"], "norm": "group"}]}, "norm='group'"),
        ({"stem": [{"features": 4, "kernal": 3}], "stages": [{"dim": 4, "mixers": ["hilo"]}]}, "kernal.*kernel"),
    ],
)
def test_a_layout_that_is_none_is_refused(layout: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ManyheadsConfig(stages=layout)


def test_what_does_not_fit_is_refused() -> None:
    layout = {"stem": [{"features": 8}], "stages": [{"dim": 8, "mixers": ["aaren"]}]}
    with pytest.raises(ValueError, match="declares"):
        ManyheadsForImageClassification(ManyheadsConfig(stages=layout))
    model = built(ManyheadsForImageClassification, small("van_b0"))
    with pytest.raises(ValueError, match="want a larger image"):
        built(ManyheadsForImageClassification, small("focalnet_tiny_srf"))(torch.zeros(1, 3, 2, 2).double())
    with pytest.raises(ValueError, match="pixel_values have shape"):
        model(torch.zeros(1, 1, 32, 32).double())
    with pytest.raises(ValueError, match="pixel_mask has shape"):
        model(torch.zeros(1, 3, 32, 32).double(), pixel_mask=torch.ones(1, 8, 8))
    patches = ManyheadsForImageClassification(
        ManyheadsConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4)
    )
    with pytest.raises(ValueError, match="leave it out"):
        patches(torch.zeros(1, 3, 8, 8), pixel_mask=torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="van_b0"):
        preset_config("van_b1")


def test_the_docs_name_every_preset() -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    assert all(name in page for name in PRESETS)
    assert sorted(PRESETS) == sorted(PUBLISHED)


@pytest.mark.parametrize("size", [0, -16, 224.0, "224", [32], [32, 0], {"height": 32, "width": 32}, None])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"image_size.*height, width"):
        ManyheadsConfig(image_size=size)
