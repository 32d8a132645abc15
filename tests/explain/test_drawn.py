"""`manyheads explain dit`: the packaged diffusion transformer, its word maps, and the page."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.explain.drawn import drawn_maps, draws, explain_drawing
from manyheads.explain.views import view_drawing
from manyheads.hosts.loading import load_any, load_model
from manyheads.tasks.two_digits import shown

CAPTION = "a 3 left of a 7"


def test_the_packaged_model_draws_what_it_is_told() -> None:
    loaded = load_model("dit")
    assert draws(loaded.model)
    assert not draws(load_model().model)
    captions = [CAPTION, "a 0 above a 1", "a 4 right of a 6", "a 2 below a 5"]
    assert sum(own["right"] for own in shown(loaded.model.sample(captions, steps=8), captions)) >= 3


def test_word_maps_are_shares_and_the_digits_are_looked_at_where_they_stand() -> None:
    model = load_model("dit").model
    pictures, guesses, maps, times = drawn_maps(model, CAPTION, steps=4)
    assert pictures.shape == (5, 16, 16, 1)
    assert guesses.shape == (4, 16, 16, 1)
    assert maps.shape == (4, 4, 4, 7, 8, 8)
    assert times == [1.0, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(maps.sum(3), np.ones((4, 4, 4, 8, 8)), rtol=1e-5)
    assert np.array_equal(pictures[-1, :, :, 0], model.sample([CAPTION], steps=4)[0, 0].numpy())
    mean = maps.mean((0, 1, 2))
    for word, own in ((2, slice(0, 4)), (6, slice(4, 8))):
        assert mean[word][:, own].sum() > 0.6 * mean[word].sum()


def test_the_packaged_unet_draws_most_of_what_it_is_told() -> None:
    """Six of eight at least, digits and their places; noise has none right."""
    loaded = load_any("unet")
    assert draws(loaded.model)
    pairs = [(3, 7), (0, 1), (4, 6), (2, 5)]
    captions = [f"a {a} {where} a {b}" for a, b in pairs for where in ("left of", "below")]
    assert sum(own["right"] for own in shown(loaded.model.sample(captions, steps=8), captions)) >= 6
    assert not any(own["right"] for own in shown(loaded.model.noise(8, 0), captions))


def test_maps_of_a_unet_are_repeated_to_one_size() -> None:
    model = load_model("unet").model
    maps = drawn_maps(model, CAPTION, steps=2)[2]
    assert maps.shape == (2, 5, 4, 7, 8, 8)
    np.testing.assert_allclose(maps.sum(3), np.ones((2, 5, 4, 8, 8)), rtol=1e-5)
    for layer, small in enumerate((False, True, True, True, False)):
        assert (np.ptp(maps[:, layer, :, :, :2, :2], (-2, -1)).max() < 1e-9) == small


def test_the_command_writes_page_and_data(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "dit", "--text", "a 2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "words, over all steps" in result.output
    report = json.loads((tmp_path / "explain.json").read_text())
    assert report["words"] == ["<start>", "a", "2"]
    assert np.asarray(report["word_maps"]["steps_words"]).shape == (20, 3, 8, 8)
    assert np.asarray(report["sample"]).shape == (16, 16)
    page = (tmp_path / "explain.html").read_text()
    assert "manyheads.views.drawing" in page
    assert "https://" not in page


def test_layers_are_chosen_and_what_a_drawing_does_not_have_is_refused() -> None:
    loaded = load_any("dit")
    found = explain_drawing(loaded, "a 2", layers=[2], steps=2)
    assert found.report["layers"] == [2]
    with pytest.raises(ValueError, match="no such layers"):
        explain_drawing(loaded, "a 2", layers=[9], steps=2)
    with pytest.raises(ValueError, match="does not know 'dog'"):
        explain_drawing(loaded, "a dog", steps=2)
    assert not loaded.model.corrections()
    with pytest.raises(ValueError, match="want one of each"):
        view_drawing(np.zeros((3, 4, 4, 1)), np.zeros((2, 4, 4, 1)), np.zeros((2, 1, 1, 3, 2, 2)), ["a"], [1.0, 0.5])
