"""The canvases: their answers are read off the pictures again, and a model of the right head takes them."""

from __future__ import annotations

import pytest
import torch

from manyheads import models
from manyheads.compare.train import build_model, evaluate
from manyheads.tasks import create_task
from manyheads.tasks.cluttered import CANVAS, _glyphs
from manyheads.tasks.digits import CLASSES, split
from manyheads.tasks.task import loss_of

SIZE = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}


def test_one_digit_stands_among_distractors() -> None:
    batch = next(create_task("cluttered", distractors=0).train_batches(20, 0))
    images, labels = _glyphs(False)
    for picture, answer in zip((batch.inputs["pixel_values"][:, 0] + 1) / 2, batch.targets, strict=True):
        rows, columns = (picture.amax(1 - axis).nonzero()[:, 0] for axis in (0, 1))
        found = [
            label
            for r in range(max(0, int(rows[0]) - 4), min(int(rows[0]), CANVAS - 16) + 1)
            for c in range(max(0, int(columns[0]) - 12), min(int(columns[0]), CANVAS - 16) + 1)
            for label in labels[(picture[r : r + 16, c : c + 16] == images).flatten(1).all(1)]
        ]
        assert answer in found


@pytest.mark.parametrize("step", [2, 8, 16])
@pytest.mark.parametrize("name", ["cluttered", "counted", "segmented"])
def test_digits_stand_at_multiples_of_the_step(name: str, step: int) -> None:
    more = {"digits": 9} if name == "segmented" else {}
    batch = next(create_task(name, step=step, distractors=0, **more).train_batches(3 if step == 2 else 20, 0))
    glyphs = {glyph.numpy().tobytes() for glyph in _glyphs(False)[0]}
    pictures = (batch.inputs["pixel_values"][:, 0] + 1) / 2
    unlike = pictures.clone()
    for row, picture in enumerate(pictures):
        for r in range(0, CANVAS - 15, step):
            for c in range(0, CANVAS - 15, step):
                window = picture[r : r + 16, c : c + 16]
                if window.numpy().tobytes() in glyphs:
                    unlike[row, r : r + 16, c : c + 16] = 0
    assert bool((pictures > 0).any())
    assert not bool((unlike > 0).any())


def test_the_count_is_that_of_the_digits() -> None:
    batch = next(create_task("counted", distractors=0).train_batches(64, 0))
    lit = (batch.inputs["pixel_values"] > -1).flatten(1).sum(1)
    assert set(batch.targets.tolist()) == set(range(7))
    for lower in range(6):
        assert lit[batch.targets == lower].max() < lit[batch.targets == lower + 1].float().mean()
    assert bool((lit[batch.targets == 0] == 0).all())


def test_distractors_are_smaller_than_digits_and_do_not_count() -> None:
    batch = next(create_task("counted", distractors=20).train_batches(32, 0))
    empty = batch.inputs["pixel_values"][batch.targets == 0]
    assert len(empty)
    assert bool(((empty > -1).flatten(1).sum(1) > 0).all())


def test_every_lit_pixel_of_a_digit_is_labelled() -> None:
    batch = next(create_task("segmented", distractors=0, digits=9).train_batches(8, 0))
    lit = batch.inputs["pixel_values"][:, 0] > -1
    assert torch.equal(lit, batch.targets != CLASSES)
    with_distractors = next(create_task("segmented", distractors=30).train_batches(8, 0))
    lit = with_distractors.inputs["pixel_values"][:, 0] > -1
    assert bool((lit & (with_distractors.targets == CLASSES)).any())
    assert not bool((~lit & (with_distractors.targets != CLASSES)).any())


def test_evaluation_shows_digits_that_training_does_not() -> None:
    (train, _), (held, _) = split()
    shown, kept = _glyphs(False)[0], _glyphs(True)[0]
    assert (len(shown), len(kept)) == (len(train), len(held))
    one = [batch.inputs["pixel_values"] for batch in create_task("counted", eval_examples=70).eval_batches(64)]
    other = [batch.inputs["pixel_values"] for batch in create_task("counted", eval_examples=70).eval_batches(7)]
    assert torch.equal(torch.cat(one), torch.cat(other))


@pytest.mark.parametrize("name", ["cluttered", "counted", "segmented"])
@pytest.mark.parametrize("mechanism", ["softmax", "hilo"])
def test_a_model_takes_it(name: str, mechanism: str) -> None:
    task = create_task(name, patch=8, eval_examples=4)
    model = build_model(task, {"name": mechanism}, SIZE)
    batch = next(task.train_batches(2, 0))
    answer = model(**batch.inputs)
    loss_of(task.aligned(answer.logits), batch.targets).backward()
    score = evaluate(task, model, torch.device("cpu"))
    assert 0 <= score.value <= 1
    assert (model.embed_patches.weight.grad != 0).any()


def test_segmentation_is_scored_on_digits() -> None:
    task = create_task("segmented")
    batch = next(task.train_batches(2, 0))
    all_background = torch.nn.functional.one_hot(torch.full_like(batch.targets, CLASSES), CLASSES + 1).float()
    right = torch.nn.functional.one_hot(batch.targets, CLASSES + 1).float()
    asked = int((batch.targets != CLASSES).sum())
    assert task.score(all_background, batch.targets) == (0.0, asked)
    assert task.score(right, batch.targets) == (float(asked), asked)


def test_labels_in_forward_are_cross_entropy_of_every_pixel() -> None:
    config = models.ManyheadsConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=[8, 16], patch_size=4, num_labels=3
    )
    model = models.ManyheadsForSemanticSegmentation(config).eval()
    pixels = torch.randn(2, 3, 8, 16)
    labels = torch.randint(3, (2, 8, 16))
    labels[0, :, :4] = -100
    out = model(pixels, labels=labels)
    assert out.logits.shape == (2, 3, 8, 16)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    changed = pixels.clone()
    changed[:, :, 4:, 12:] += 1
    moved = (model(changed).logits - out.logits).abs().amax((0, 1))
    assert bool((moved > 0).any())


def test_the_last_layer_gives_each_patch_its_own_pixels() -> None:
    config = models.ManyheadsConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=[8, 16], patch_size=4, num_labels=3
    )
    model = models.ManyheadsForSemanticSegmentation(config).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 8, 16)).logits
        states = model.stack(model.embed_patches(model._patches(torch.zeros(1, 3, 8, 16))).flatten(1, 2)).last
        logits = model(torch.zeros(1, 3, 8, 16)).logits
        for row in range(2):
            for column in range(4):
                own = model.classifier(states[0, 4 * row + column]).view(3, 4, 4)
                place = logits[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                torch.testing.assert_close(place, own)


@pytest.mark.parametrize("patch", [3, 0, 32])
def test_a_patch_that_does_not_fit_is_refused(patch: int) -> None:
    with pytest.raises(ValueError, match="patch"):
        create_task("cluttered", patch=patch)
