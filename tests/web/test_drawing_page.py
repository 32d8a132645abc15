"""The view of a drawing in a browser: its pictures and its word maps are those that it was given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from playwright.sync_api import Page

from manyheads.explain.views import view_drawing, write_page


def test_a_drawing_shows_its_steps_and_the_maps_of_the_layer_that_is_asked_for(
    visit: Callable[[Path], Page], tmp_path: Path
) -> None:
    pictures = np.zeros((4, 6, 6, 1))
    pictures[3, 0, 0] = 1.0
    maps = np.full((3, 2, 2, 2, 3, 3), 0.25)
    maps[:, 1, :, 1, 2, 0] = 1.0
    view = view_drawing(pictures, pictures[1:], maps, ["a", "<b>7"], [1.0, 0.6, 0.3])
    page = visit(write_page(tmp_path / "drawing.html", [view]))
    assert page.locator(".mh-strip tbody tr").count() == 4
    assert page.locator(".mh-strip tbody tr td canvas").count() == 12
    assert page.locator(".mh-strip tbody th").all_inner_texts() == ["picture", "guess", "a", "<b>7"]

    def shades() -> list[list[int]]:
        """Of the first step's map of the second word, the patch in the last row and the first one."""
        return page.evaluate(
            """() => {
              const tile = document.querySelectorAll(".mh-strip tbody tr")[3].querySelectorAll("canvas")[0];
              const { data } = tile.getContext("2d").getImageData(0, 0, 3, 3);
              return [6, 0].map((patch) => [...data.slice(4 * patch, 4 * patch + 3)]);
            }"""
        )

    drawn = page.evaluate(
        """() => [...document.querySelector(".mh-drawn canvas").getContext("2d").getImageData(0, 0, 2, 1).data]"""
    )
    assert drawn == [255, 255, 255, 255, 0, 0, 0, 255]
    strong, weak = shades()
    assert strong != weak
    page.get_by_label("Layer").select_option(label="layer 0")
    assert len({tuple(own) for own in shades()}) == 1
    page.get_by_label("Layer").select_option(label="layer 1")
    assert shades()[0] == strong
    assert page.get_by_text("<b>7: 0.33").count() == 1
