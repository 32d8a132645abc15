"""The detector: boxes of a picture in a padded batch are those of the picture alone, on patches and on hierarchies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForObjectDetection
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from manyheads.functional.box_sets import set_losses
from manyheads.models import ManyheadsConfig, ManyheadsForObjectDetection
from manyheads.models.detection import _places, _sines, _spread

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {
    "stem": [{"features": 8, "kernel": 4, "stride": 4, "after": "layer"}],
    "stages": [
        {"dim": 8, "depth": 1, "heads": 2, "mixers": [{"name": "twins-local", "window": 2}]},
        {"dim": 24, "depth": 1, "heads": 2, "mixers": ["softmax"], "down": {"after": "layer"}},
    ],
}


def _model(**more: Any) -> ManyheadsForObjectDetection:
    torch.manual_seed(0)
    given = {**SIZES, "num_queries": 5, "num_labels": 3, "image_size": [16, 24], "patch_size": 4, **more}
    return ManyheadsForObjectDetection(ManyheadsConfig(**given)).eval()


def _labels(*counts: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [
        {
            "class_labels": torch.randint(3, (count,), generator=rng),
            "boxes": 0.2 + 0.3 * torch.rand(count, 4, generator=rng),
        }
        for count in counts
    ]


@pytest.mark.parametrize("more", [{}, {"layers": ["hilo"]}, {"cross_layers": ["luong"]}, {"stages": STAGES}])
def test_it_gives_a_class_and_a_box_for_each_query(more: dict[str, Any]) -> None:
    model, pixels = _model(**more), torch.randn(3, 3, 16, 24)
    out = model(pixels, labels=_labels(2, 0, 4), output_attentions=True, output_hidden_states=True)
    assert out.logits.shape == (3, 5, 4)
    assert out.pred_boxes.shape == (3, 5, 4)
    assert bool(((out.pred_boxes > 0) & (out.pred_boxes < 1)).all())
    assert out.cross_attentions[0].shape[-2:] == ((5, 6) if "stages" in more else (5, 24))
    assert out.hidden_states[0].shape[1:3] == (4, 6)
    out.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters())


def test_the_loss_is_that_of_the_sets() -> None:
    model, labels = _model(), _labels(2, 0, 4)
    out = model(torch.randn(3, 3, 16, 24), labels=labels)
    classes, boxes = torch.full((3, 4), -1), torch.zeros(3, 4, 4)
    for row, own in enumerate(labels):
        classes[row, : len(own["boxes"])], boxes[row, : len(own["boxes"])] = own["class_labels"], own["boxes"]
    wanted = set_losses(out.logits, out.pred_boxes, classes, boxes)
    torch.testing.assert_close(out.loss, wanted["class"] + 5 * wanted["l1"] + 2 * wanted["giou"])
    for name, value in wanted.items():
        torch.testing.assert_close(out.loss_dict[name], value)


def test_a_picture_in_a_padded_batch_is_found_as_alone() -> None:
    model = _model(stages=STAGES).double()
    pixels, real = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.ones(2, 32, 32)
    real[1, 16:], real[1, :, 24:] = 0, 0
    with torch.no_grad():
        both, alone = model(pixels, pixel_mask=real), model(pixels[1:, :, :16, :24])
    torch.testing.assert_close(both.logits[1], alone.logits[0])
    torch.testing.assert_close(both.pred_boxes[1], alone.pred_boxes[0])


def test_queries_know_where_they_are_from_the_start() -> None:
    points = _spread(7).sigmoid()
    assert points.shape == (7, 2)
    assert len(points.unique(dim=0)) == 7
    assert bool(((points > 0) & (points < 1)).all())
    cells = _places(torch.zeros(1, 2, 4, 8), None)
    wanted = [[(x + 0.5) / 4, (y + 0.5) / 2] for y in range(2) for x in range(4)]
    torch.testing.assert_close(cells[0], torch.tensor(wanted))
    for dim in (16, 18, 3):
        found = _sines(cells, dim)
        assert found.shape == (1, 8, dim)
        assert len(found[0].unique(dim=0)) == 8 if dim > 3 else True


def test_it_is_saved_and_opened(tmp_path: Path) -> None:
    model, pixels = _model(), torch.randn(1, 3, 16, 24)
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).pred_boxes, model(pixels).pred_boxes)
    assert "AutoModelForObjectDetection" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="AutoModelForObjectDetection"):
        AutoModel.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    model, pixels = _model(), torch.randn(2, 3, 16, 24)
    with pytest.raises(ValueError, match="labels of 1 pictures for 2"):
        model(pixels, labels=_labels(1))
    with pytest.raises(ValueError, match="6 boxes in a picture, and 5 predictions"):
        model(pixels, labels=_labels(6, 1))
    wrong = _labels(2, 2)
    wrong[1]["class_labels"][0] = 3
    with pytest.raises(ValueError, match=r"labels\[1\]: classes"):
        model(pixels, labels=wrong)
    wrong = _labels(2, 2)
    wrong[0]["boxes"] = wrong[0]["boxes"][:1]
    with pytest.raises(ValueError, match=r"labels\[0\]: boxes"):
        model(pixels, labels=wrong)
    with pytest.raises(ValueError, match="pixel_mask"):
        model(pixels, pixel_mask=torch.ones(2, 16, 24))
    with pytest.raises(ValueError, match="num_queries"):
        _model(num_queries=0)


def _annotated(sizes: list[tuple[int, int]]) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    box = {"category_id": 1, "bbox": [5, 6, 8, 10], "area": 80, "iscrowd": 0}
    return pictures, [{"image_id": i, "annotations": [{"image_id": i, **box}]} for i in range(len(sizes))]


def test_labels_of_an_image_processor_are_those_of_each_picture_alone() -> None:
    """transformers' processors put boxes in parts of what the batch is padded to, and say so by `size`."""
    model = _model(stages=STAGES)
    pictures, annotations = _annotated([(24, 40), (40, 24), (32, 40)])
    processor = DetrImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 48})
    batch = processor(images=pictures, annotations=annotations, return_tensors="pt")
    assert not bool(batch["pixel_mask"].bool().all())
    together, alone = model(**batch), []
    for picture, annotation in zip(pictures, annotations, strict=True):
        one = processor(images=picture, annotations=annotation, return_tensors="pt")
        alone.append(model(**one).loss_dict)
    for part in ("l1", "giou"):
        mean = torch.stack([losses[part] for losses in alone]).mean()
        torch.testing.assert_close(together.loss_dict[part], mean, rtol=1e-4, atol=1e-5)


def test_a_label_that_names_its_own_picture_stays_as_it_is() -> None:
    """`size` of the picture itself, as DETR's own code has it, and of a picture that was resized since."""
    model, pixels, real = _model(stages=STAGES), torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32)
    real[:, 16:] = 0
    plain = _labels(2)
    wanted = model(pixels, pixel_mask=real, labels=plain).loss
    for size in ([16, 32], [480, 640]):
        told = [{**plain[0], "size": torch.tensor(size)}]
        torch.testing.assert_close(model(pixels, pixel_mask=real, labels=told).loss, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": torch.tensor([[12.0, 8.0, 6.0, 4.0]])}, "parts of the picture"),
        ({"boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]])}, "parts of the picture"),
        ({"boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1]])}, "parts of the picture"),
        ({"class_labels": torch.tensor([1.7])}, "class_labels.*float32"),
        ({"class_labels": [1]}, "class_labels.*list"),
        ({"class_labels": None}, "class_labels.*NoneType"),
        ({"boxes": [[0.5, 0.5, 0.1, 0.1]]}, "boxes.*list"),
    ],
)
def test_labels_that_are_none_are_refused(change: dict[str, Any], words: str) -> None:
    good = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    with pytest.raises(ValueError, match=words):
        _model()(torch.randn(1, 3, 16, 24), labels=[{**good, **change}])
