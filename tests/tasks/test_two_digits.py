"""Scenes of two digits: captions, places, and what is read off a picture."""

import numpy as np
import pytest
import torch

from manyheads.tasks.two_digits import CELLS, batch, cell_of, draw_caption, draw_scene, read_caption, shown


def test_captions_say_digits_and_cells() -> None:
    assert read_caption("a 3 left of a 7") == ((3, 7), ("left", "right"))
    assert read_caption("a 2 below a 5") == ((2, 5), ("bottom", "top"))
    assert read_caption("a 3 and a 7") == ((3, 7), None)
    assert read_caption("a 4") == ((4,), None)
    for wrong in ("a 3 on a 7", "three", "a 3 left a 7"):
        with pytest.raises(ValueError, match="want such as"):
            read_caption(wrong)


def test_a_batch_is_pictures_of_its_captions() -> None:
    pictures, captions = batch(np.random.default_rng(0), 40)
    assert pictures.shape == (40, 1, 16, 16)
    assert float(pictures.min()) == -1
    for picture, caption in zip(pictures, captions, strict=True):
        scene = read_caption(caption)
        inked = {cell for cell in CELLS if float(cell_of(picture[None], cell)[0, 2:6, 2:6].max()) > 0}
        assert len(inked) >= len(scene.digits)
        assert scene.cells is None or set(scene.cells) <= inked
    rng = np.random.default_rng(1)
    assert len({draw_caption(rng) for _ in range(50)}) > 30


def test_held_out_scenes_are_read_right_and_wrong_ones_are_told() -> None:
    rng = np.random.default_rng(0)
    captions = [f"a {i} left of a {(i + 3) % 10}" for i in range(10)]
    pictures = torch.from_numpy(np.stack([draw_scene(own, rng, held_out=True) for own in captions]))[:, None]
    assert sum(own["right"] for own in shown(pictures, captions)) >= 7
    turned = [f"a {i} right of a {(i + 3) % 10}" for i in range(10)]
    assert sum(own["swapped"] for own in shown(pictures, turned)) >= 7
    twice = pictures.clone()
    twice[..., 8:] = pictures[..., :8]
    assert sum(own["doubled"] for own in shown(twice, captions)) >= 7
    assert not any(own["right"] for own in shown(-torch.ones_like(pictures), captions))
