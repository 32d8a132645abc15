"""A picture is explained as the model sees it elsewhere: turned upright, and as its folder's processor makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from manyheads.explain.explanation import explain_image
from manyheads.explain.image_file import pictured
from manyheads.hosts.image_files import opened_image
from manyheads.hosts.loading import Loaded, load_any
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM, ManyheadsForNodeClassification

SQUARE = {"height": 16, "width": 16}
PROCESSORS: dict[str, Any] = {
    "plain": ViTImageProcessorPil(size=SQUARE),
    "not normed": ViTImageProcessorPil(size=SQUARE, do_normalize=False),
    "not scaled": ViTImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
    "cropped": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=SQUARE),
    "cropped by share": ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.8),
}


@pytest.fixture
def model(tmp_path: Path) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    own = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)).eval()
    own.save_pretrained(tmp_path)
    return own


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A wide picture that its file says is to be turned."""
    cells = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(cells).save(tmp_path / "photo.jpg", exif=turned)
    return tmp_path / "photo.jpg"


def test_a_photo_is_upright(photo: Path) -> None:
    with Image.open(photo) as held:
        assert held.size == (45, 30)
    assert opened_image(photo).size == (30, 45)
    assert np.array_equal(np.array(opened_image(photo).convert("RGB")), np.array(load_image(str(photo))))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_picture_is_what_the_processor_makes(
    kind: str, model: ViTForImageClassification, photo: Path, tmp_path: Path
) -> None:
    PROCESSORS[kind].save_pretrained(tmp_path)
    wanted = PROCESSORS[kind](load_image(str(photo)), return_tensors="pt")["pixel_values"].float()
    image, inputs = pictured(load_any(tmp_path), photo)
    assert_close(inputs["pixel_values"], wanted)
    with torch.no_grad():
        best = int(model(wanted).logits.argmax())
    assert explain_image(load_any(tmp_path), photo).report["target"] == best
    # The page shows that picture, and not another part of the photo.
    again = ViTImageProcessorPil(size=SQUARE, do_resize=False, do_normalize=False)(image, return_tensors="pt")
    mean, spread = (
        torch.tensor(getattr(PROCESSORS[kind], name))[:, None, None] for name in ("image_mean", "image_std")
    )
    seen = wanted * spread + mean if PROCESSORS[kind].do_normalize else wanted
    seen = seen if PROCESSORS[kind].do_rescale else seen / 255
    assert_close(again["pixel_values"], seen, atol=0.6 / 255, rtol=0)


def test_a_processor_that_does_not_load_is_refused(
    model: ViTForImageClassification, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Unheard"}')
    with pytest.raises(ValueError, match="no image processor that can be read"):
        pictured(load_any(tmp_path), photo)


@pytest.mark.parametrize("kind", [ManyheadsForCausalLM, ManyheadsForNodeClassification])
def test_a_model_of_text_or_graphs_reads_no_picture(kind: Any, photo: Path, tmp_path: Path) -> None:
    """Whose configuration has an image size, as that of every model of this package."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = kind(ManyheadsConfig(**sizes, vocab_size=256))
    with pytest.raises(ValueError, match="reads no images: give --text"):
        explain_image(Loaded(model, None, "own"), photo)
