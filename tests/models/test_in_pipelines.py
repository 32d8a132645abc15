"""Models for pictures in transformers' pipelines: known there, and what is found is the model's own answer."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from manyheads.models import (
    ManyheadsConfig,
    ManyheadsForImageClassification,
    ManyheadsForObjectDetection,
    ManyheadsForSemanticSegmentation,
)

STAGES = {"stem": [{"features": 8, "kernel": 4, "stride": 4}], "stages": [{"dim": 8, "heads": 2, "mixers": ["hilo"]}]}
SIZE = {"height": 24, "width": 32}
CASES: dict[str, tuple[Any, Any]] = {
    "image-classification": (ManyheadsForImageClassification, ViTImageProcessorPil(size=SIZE)),
    "image-segmentation": (ManyheadsForSemanticSegmentation, SegformerImageProcessorPil(size=SIZE)),
    "object-detection": (
        ManyheadsForObjectDetection,
        DetrImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 48}),
    ),
}


@pytest.mark.parametrize("task", CASES)
def test_a_pipeline_knows_the_model(task: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    kind, processor = CASES[task]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_queries": 3}
    model = kind(ManyheadsConfig(**sizes, stages=STAGES, num_labels=3)).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        made = pipeline(task, model=model, image_processor=processor)
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    given = processor(picture, return_tensors="pt")
    with torch.no_grad():
        output = model(**{name: given[name] for name in ("pixel_values", "pixel_mask") if name in given})
    if task == "image-classification":
        shares = {one["label"]: one["score"] for one in made(picture)}
        wanted = output.logits[0].softmax(0)
        assert shares == pytest.approx({f"LABEL_{i}": float(share) for i, share in enumerate(wanted)}, abs=1e-4)
    elif task == "image-segmentation":
        wanted = processor.post_process_semantic_segmentation(output, target_sizes=[(30, 50)])[0]
        found = {one["label"]: np.array(one["mask"]) > 0 for one in made(picture)}
        for number in wanted.unique().tolist():
            assert np.array_equal(found[f"LABEL_{number}"], (wanted == number).numpy())
    else:
        wanted = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(30, 50)])[0]
        found = [one["box"]["xmin"] for one in made(picture, threshold=0.0)]
        assert sorted(found) == sorted(wanted["boxes"].int()[:, 0].tolist())
