"""Pictures of who sees whom against known patterns, the pages of the families, and the board in a browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads import list_attentions
from manyheads.card import Family
from manyheads.catalogue.families import family_page, picture
from manyheads.catalogue.seen import LENGTH, Picture, seen, svg
from manyheads.cli import main
from manyheads.registry import mechanism_class

ROOT = Path(__file__).parent.parent.parent
FAMILIES = ROOT / "docs" / "families"
HOW = "run `python -m manyheads.catalogue --families docs/families`"


def shares(name: str) -> dict[str, Tensor]:
    return {one.pattern: one.shares for one in seen(mechanism_class(name))}


def test_pictures_of_known_patterns() -> None:
    i, j = torch.meshgrid(torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    found = shares("softmax")
    torch.testing.assert_close(found["causal-self"], (j <= i).double())
    torch.testing.assert_close(found["noncausal-self"], torch.ones(LENGTH, LENGTH, dtype=torch.float64))
    window = mechanism_class("neighborhood").card.example["window"]
    torch.testing.assert_close(shares("neighborhood")["causal-self"], ((j <= i) & (i - j < window)).double())
    local = shares("halonet")["grid"]
    assert 0 < float(local.sum()) < local.numel()


@pytest.mark.parametrize("name", ["moba", "hyena", "mosa"])
def test_no_picture_shows_the_future(name: str) -> None:
    assert float(shares(name)["causal-self"].triu(1).sum()) == 0


def test_what_content_decides_is_light() -> None:
    found = shares("moba")["causal-self"]
    assert bool(((found > 0) & (found < 1)).any())
    assert 'class="b"' in picture("moba")


def test_an_svg_draws_each_cell_once() -> None:
    held = torch.tensor([[1.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.5, 1.0]])
    text = svg([Picture("pool", "", held)], "x")
    drawn = torch.zeros(2, 4)
    for kind, value in (("a", 1.0), ("b", 0.5)):
        (path,) = re.findall(rf'class="{kind}" d="([^"]+)"', text)
        for x, y, wide in re.findall(r"M(\d+) (\d+)h(\d+)", path):
            drawn[int(y) // 4, int(x) // 4 : (int(x) + int(wide)) // 4] += value
    torch.testing.assert_close(drawn, held)


@pytest.mark.parametrize("name", list_attentions())
def test_pictures_are_in_step(name: str) -> None:
    text = (FAMILIES / "pictures" / f"{name}.svg").read_text()
    assert len(text) <= 3000
    assert text == picture(name), HOW


def test_pages_of_families_are_in_step() -> None:
    assert {path.stem for path in FAMILIES.glob("*.md")} == {family.value for family in Family}, HOW
    assert {path.stem for path in FAMILIES.glob("pictures/*")} == set(list_attentions()), HOW
    for family in Family:
        assert (FAMILIES / f"{family.value}.md").read_text() == family_page(family), HOW


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("board") / "board.html"
    with pytest.raises(SystemExit) as stopped:
        main(["board", "--out", str(path), "--family", "linear"])
    assert not stopped.value.code
    return path


def test_the_board_holds_what_ships_and_nothing_from_outside(board: Path) -> None:
    text = board.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    rows = json.loads(found[1])["rows"]
    assert [row["name"] for row in rows] == list_attentions(family="linear")
    assert re.findall(r"(?:src|href)=", text) == []
    assert len(text) < 3_000_000 / len(list_attentions()) * len(rows)


def test_the_board_in_a_browser(board: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(board.as_uri())
    page.wait_for_selector("body[data-ready]")

    def names() -> list[str]:
        return page.locator("tbody th").all_inner_texts()

    assert names() == list_attentions(family="linear")
    page.click('thead button:text-is("recall")')
    figures = page.locator("tbody td.recall").all_inner_texts()
    known = [float(text[:-1]) for text in figures if text]
    assert known == sorted(known, reverse=True)
    assert "" not in figures[: len(known)]
    page.select_option("#pattern", "causal-self")
    assert set(names()) == set(list_attentions(family="linear", pattern="causal-self"))
    assert page.locator("#scatter circle").count() > 0
    page.click('tbody th button:text-is("based")')
    card = page.locator("tr.card")
    assert "Taylor" in card.inner_text()
    assert card.locator(".picture svg").count() == 1
    assert card.locator("svg.curve polyline").count() > 0
    page.fill("#text", "no mechanism says this")
    assert names() == []
    page.close()
    assert said == []


def test_the_board_on_a_phone(board: Path, browser: Any) -> None:
    """Its chart is scrolled, not shrunk until nobody can read it, and the page itself stays as wide as the screen."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(board.as_uri())
    page.wait_for_selector("body[data-ready]")
    heights = page.locator("#scatter text").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert heights
    assert min(heights) >= 9
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
