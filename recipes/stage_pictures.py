"""What windows and hierarchies look at, as docs/images.md shows it: `python recipes/stage_pictures.py`.

Two small models learn to name a digit among distractors, one with windows over one grid, one with two sizes: some
minutes on one core. Drawn are a picture that neither has seen, and Grad-CAM of the right digit on every layer or stage;
the models and the picture are kept for `manyheads explain`.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from manyheads.explain.pictures import cam, stages_of
from manyheads.models import ManyheadsConfig, ManyheadsForImageClassification
from manyheads.tasks import create_task

TARGET = Path(__file__).parent.parent / "docs" / "images" / "stages.png"
SHARED = {"num_channels": 1, "num_labels": 10, "image_size": 64}
_BLOCK = {"dim": 64, "depth": 1, "heads": 4, "mlp_ratio": 2.0}
WINDOWED = {
    "stem": [{"features": 64, "kernel": 8, "stride": 8}],
    "stages": [
        {**_BLOCK, "mixers": [{"name": "twins-local", "window": 4}], "positions": [8, 8]},
        {**_BLOCK, "mixers": [{"name": "neighborhood-grid", "window": 3}]},
    ],
}
HIERARCHY = {
    "stem": [{"features": 32, "kernel": 8, "stride": 4, "padding": 2, "after": "layer", "act": "relu"}],
    "stages": [
        {"dim": 32, "depth": 1, "heads": 2, "mixers": [{"name": "twins-local", "window": 4}], "mlp_ratio": 2.0},
        {"dim": 64, "depth": 2, "heads": 4, "mixers": ["softmax"], "mlp_ratio": 2.0, "down": {"after": "layer"}},
    ],
}
SIDE, GAP = 128, 6


def trained(model: Any, task: Any, steps: int) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step, batch in enumerate(islice(task.train_batches(32, 0), steps)):
        loss = task.loss(model(**batch.inputs).logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {float(loss.detach()):.2f}", flush=True)
    return model.eval()


def over(picture: Tensor, heat: Tensor) -> np.ndarray:
    """The picture, red where the map is high."""
    own = heat / heat.max().clamp(min=1e-12)
    high = Image.fromarray((255 * own).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    share = np.asarray(high, dtype=np.float32)[..., None] / 255
    grey = np.asarray(plain(picture), dtype=np.float32)
    red = np.array([230.0, 60.0, 20.0], dtype=np.float32)
    return (grey * (1 - 0.6 * share) + red * 0.6 * share).astype(np.uint8)


def plain(picture: Tensor) -> np.ndarray:
    grey = Image.fromarray((127.5 * (picture + 1)).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.asarray(grey.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--models", type=Path, default=Path("runs/stages"), help="where the models and the picture go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, rows = create_task("cluttered", patch=8, step=8, distractors=4, eval_examples=128), []
    held = next(iter(task.eval_batches(128)))
    answers: list[Tensor] = []
    models = []
    arguments.models.mkdir(parents=True, exist_ok=True)
    for name, layout in (("windowed", WINDOWED), ("hierarchy", HIERARCHY)):
        torch.manual_seed(0)
        config = ManyheadsConfig(**SHARED, stages=layout)
        model = trained(ManyheadsForImageClassification(config), task, arguments.steps)
        with torch.no_grad():
            answers.append(model(**held.inputs).logits.argmax(-1))
        print(f"{name}: {float((answers[-1] == held.targets).float().mean()):.2f} right", flush=True)
        model.save_pretrained(arguments.models / name)
        models.append(model)
    # The first picture that both name rightly; else there is no right answer whose reason could be shown.
    chosen = int(((answers[0] == held.targets) & (answers[1] == held.targets)).int().argmax())
    pixels, target = held.inputs["pixel_values"][chosen : chosen + 1], int(held.targets[chosen])
    Image.fromarray((127.5 * (pixels[0, 0] + 1)).byte().numpy()).save(arguments.models / "picture.png")
    for name, model in zip(("windowed", "hierarchy"), models, strict=True):
        print(f"manyheads explain {arguments.models / name} --image {arguments.models / 'picture.png'}")
        maps = [cam(model, pixels, target, stage=stage)[0] for stage in range(len(stages_of(model)))]
        rows.append([plain(pixels[0, 0]), *(over(pixels[0, 0], own) for own in maps)])
    page = np.full((len(rows) * (SIDE + GAP) - GAP, 3 * (SIDE + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (SIDE + GAP), j * (SIDE + GAP)
            page[top : top + SIDE, left : left + SIDE] = tile
    Image.fromarray(page).save(arguments.out, optimize=True)
    print(f"a {target}, written to {arguments.out}")


if __name__ == "__main__":
    main()
