"""Pages in a real browser: what is pressed, pointed at and typed does what it says."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Locator, Page, expect

from manyheads.explain.views import (
    AttentionStore,
    Panel,
    head_view,
    view_embedding,
    view_flow,
    view_heads,
    view_image,
    view_maps,
    view_model,
    view_neurons,
    view_table,
    view_text,
    write_page,
)
from manyheads.explain.views.page import KINDS, page_spec, safe_json, script, style
from manyheads.explain.views.widget import RENDER

Visit = Callable[..., Page]
LAYERS, HEADS, TOKENS = 2, 3, 24
WORDS = [f"w{i}" for i in range(TOKENS)]
WORDS[3:9] = ["<img src=x onerror='window.hacked=1'>", " ", "\n", "שלום", "", "\u202eabc"]


def calls_of(attention: list[torch.Tensor]) -> list[Any]:
    """What a tap would have recorded, with queries and keys of whole numbers."""
    made = []
    for layer, weights in enumerate(attention):
        vectors = torch.arange(HEADS * TOKENS * 4).view(1, HEADS, TOKENS, 4) % 7 - 3.0
        made.append(
            SimpleNamespace(
                layer=layer, site=SimpleNamespace(stack="encoder", kind="self", path="made"), heads=HEADS, scale=0.5,
                query=vectors, key=vectors + layer, check_heads=lambda heads: list(heads or range(HEADS)),
                of_heads=lambda key, heads: key[:, heads], blocks=lambda heads: [slice(None)],
                weights=lambda heads, rows, weights=weights: weights[:, heads][:, :, rows],
            )
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def attention() -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.softmax(3 * torch.randn(1, HEADS, TOKENS, TOKENS), -1) for _ in range(LAYERS)]


@pytest.fixture(scope="module")
def everything(attention: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = AttentionStore.from_attention(attention)
    calls, panel = calls_of(attention), Panel(store, WORDS, second=10)
    score = torch.tensor([[0.5, 0.25, -1.0], [2.0, float("nan"), 0.125]])
    views = [
        view_heads(panel), view_model(panel), view_neurons(calls, WORDS), view_flow(store, WORDS, token=9),
        view_text(["אחת", " שתיים", "\n", "<b>"], {"plain": [1.0, -2.0, 0.5, 0.0], "second": [0.0, 0.0, 3.0, 0.0]}),
        view_image(np.full((40, 60, 3), 128, np.uint8), {"heat": torch.arange(6.0).view(2, 3)}),
        view_maps(store), view_table({"Sink": score, "Echo": -score}), view_embedding(calls, WORDS),
    ]  # fmt: skip
    return write_page(tmp_path_factory.mktemp("pages") / "all.html", views, title="<b>All</b>", note="A </script> note")


def tab(page: Page, name: str) -> Locator:
    page.get_by_role("tab", name=name, exact=True).click()
    return page.locator(".mh-pane:not([hidden])")


def token(pane: Locator | Page, side: str, index: int) -> Locator:
    return pane.locator(f".mh-{side} [data-index='{index}']")


def choice(pane: Locator | Page, name: str) -> Locator:
    return pane.get_by_role("combobox", name=name, exact=True)


def test_every_view_opens_quietly_and_shows_text_as_text(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    expect(page.get_by_role("heading", level=1)).to_have_text("<b>All</b>")
    for name in page.get_by_role("tab").all_inner_texts():
        pane = tab(page, name)
        expect(pane).to_be_visible()
        assert pane.locator(".mh-error").count() == 0
    assert page.evaluate("[window.hacked, document.querySelectorAll('img, b').length]") == [None, 0]
    items = tab(page, "Head view").locator(".mh-left .mh-item")
    expect(items).to_have_count(TOKENS)
    shown = items.all_inner_texts()
    texts = [text.split("\n")[-1] for text in shown[3:9]]
    assert [each.removeprefix(str(3 + i)) for i, each in enumerate(texts)] == [
        WORDS[3], "·", "⏎", "שלום", "∅", "⟨202E⟩abc",
    ]  # fmt: skip


def test_the_browser_reads_what_python_wrote(visit: Visit, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = torch.softmax(2 * torch.randn(1, 1, 40, 40), -1)
    signed = torch.randn(1, 1, 40, 40)
    for budget, given in ((1, weights), (0.0007, weights), (1, signed), (0.0007, signed)):
        store = AttentionStore.from_attention([given], budget_mb=budget)
        page = visit(write_page(tmp_path / "one.html", [view_heads(Panel(store, [str(i) for i in range(40)]))]))
        read = page.evaluate("""async () => {
          const spec = JSON.parse(document.getElementById("mh-spec").textContent).views[0].data.panels[0].store;
          const store = new manyheads.Store(spec, { source: manyheads.pageSource() }), found = [], turned = [];
          const rows = await store.head(0, 0);
          for (let i = 0; i < 40; i++) rows.row(i, (j, weight) => found.push([i, j, weight]));
          for (let j = 0; j < 40; j++) rows.looking(j, (i, weight) => turned.push([i, j, weight]));
          return [found, turned, Array.from(rows.share)];
        }""")
        for entries in read[:2]:
            matrix = np.zeros((40, 40))
            for i, j, weight in entries:
                matrix[i, j] = weight
            np.testing.assert_allclose(matrix, store.matrix(0, 0), rtol=1e-5)
        np.testing.assert_allclose(read[2], store.codes(0, 0).share, rtol=1e-6)


def test_head_view_answers_pointer_and_keys(visit: Visit, everything: Path, attention: list[torch.Tensor]) -> None:
    page = visit(everything)
    details = page.locator(".mh-details")
    token(page, "left", 11).hover()
    expect(details.locator("h2")).to_have_text("From 11w11")
    row = attention[0][0, :, 11]
    head, column = divmod(int(row.argmax()), TOKENS)
    first = details.locator("tbody tr").first
    expect(first.locator("td").first).to_have_text(f" {head}")
    expect(first.locator(".mh-index")).to_have_text(str(column))
    assert abs(float(first.locator(".mh-num").inner_text()) - float(row.max())) < 0.01
    expect(details).to_contain_text("All of this row's mass is shown.")
    token(page, "left", 12).click()
    token(page, "left", 2).hover()
    expect(details.locator("h2")).to_have_text("From 12w12")
    page.keyboard.press("Escape")
    expect(details.locator("h2")).to_have_count(0)
    page.locator(".mh-left").focus()
    page.keyboard.press("End")
    expect(token(page, "left", TOKENS - 1)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".mh-right")).to_be_focused()
    expect(details.locator("h2")).to_have_text(f"To {TOKENS - 2}w22")


def test_head_view_chooses_layers_heads_and_sentences(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    swatch = page.get_by_role("button", name="Head 1", exact=True)
    expect(swatch).to_have_attribute("aria-pressed", "true")
    swatch.click()
    expect(swatch).to_have_attribute("aria-pressed", "false")
    swatch.dblclick()
    token(page, "left", 0).hover()
    heads = page.locator(".mh-details tbody td:first-child").all_inner_texts()
    assert {each.strip() for each in heads} == {"1"}
    before = page.locator(".mh-details tbody").inner_text()
    choice(page, "Layer").select_option("1")
    token(page, "left", 0).hover()
    expect(page.locator(".mh-details tbody")).not_to_have_text(before)
    choice(page, "Show").select_option(index=3)
    assert page.locator(".mh-left .mh-item").count() == 10
    assert page.locator(".mh-right .mh-item").count() == TOKENS - 10


def test_model_view_opens_heads(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    pane = tab(page, "Model view")
    expect(pane.locator(".mh-thumb")).to_have_count(LAYERS * HEADS)
    pane.get_by_role("gridcell", name="Layer 1, head 2").hover()
    expect(pane.locator(".mh-caption")).to_contain_text("Layer 1, head 2: entropy")
    pane.locator(".mh-thumb").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(pane.get_by_role("button", name="← All heads")).to_be_focused()
    expect(pane.locator(".mh-swatch[aria-pressed=true]")).to_have_text("1")
    assert choice(pane, "Layer").input_value() == "1"
    page.keyboard.press("Escape")
    expect(pane.get_by_role("gridcell", name="Layer 1, head 1")).to_be_focused()


def test_tabs_follow_the_arrow_keys(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    page.get_by_role("tab", name="Head view").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Model view")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_have_count(1)
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Queries and keys")).to_have_attribute("aria-selected", "true")
    # A focused control is seen.
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_table_sorts_by_any_column_and_opens_heads(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    pane = tab(page, "Heads")

    def column(place: int) -> list[str]:
        return pane.locator(f"tbody td:nth-child({place})").all_inner_texts()

    assert column(3) == ["2", "0.5", "0.25", "0.125", "-1", "–"]
    pane.get_by_role("button", name="Sink").click()
    assert column(3) == ["-1", "0.125", "0.25", "0.5", "2", "–"]
    expect(pane.get_by_role("columnheader", name="Sink")).to_have_attribute("aria-sort", "ascending")
    pane.get_by_role("button", name="Echo").click()
    assert column(4) == ["1", "-0.125", "-0.25", "-0.5", "-2", "–"]
    choice(pane, "Layer").select_option("1")
    assert column(1) == ["1"] * 3
    pane.get_by_role("button", name="Open layer 1, head 2").click()
    expect(page.get_by_role("tab", name="Head view")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".mh-swatch[aria-pressed=true]")).to_have_text("2")


def test_neuron_view_shows_the_product(visit: Visit, everything: Path, attention: list[torch.Tensor]) -> None:
    page = visit(everything)
    pane = tab(page, "Neuron view")
    choice(pane, "Layer").select_option("1")
    choice(pane, "Head").select_option("2")
    pane.locator(".mh-pick").nth(10).click()
    query = [(2 * TOKENS * 4 + 10 * 4 + d) % 7 - 3 for d in range(4)]
    best = int(attention[1][0, 2, 10].argmax())
    key = [(2 * TOKENS * 4 + best * 4 + d) % 7 - 3 + 1 for d in range(4)]
    first = pane.locator("tbody tr").first
    expect(first.locator(".mh-index")).to_have_text(str(best))
    score = 0.5 * sum(a * b for a, b in zip(query, key, strict=True))
    expect(first.locator(".mh-num").first).to_have_text(f"{score:.2f}")
    pane.locator("tbody button").nth(3).click()
    expect(pane.locator("tbody tr").nth(3)).to_have_class("mh-chosen")
    pane.locator(".mh-picks").focus()
    page.keyboard.press("ArrowDown")
    expect(pane.locator(".mh-pick").nth(11)).to_have_attribute("aria-selected", "true")


def test_flow_follows_a_token(visit: Visit, everything: Path, attention: list[torch.Tensor]) -> None:
    page = visit(everything)
    pane = tab(page, "Flow")
    choice(pane, "Tokens per layer").select_option("16")
    pane.get_by_label("Position of the token").fill("2")
    one = [(layer[0].mean(0).double() + torch.eye(TOKENS)) / 2 for layer in attention]
    flow = one[1][2].topk(16)
    after = float(flow.values[flow.indices.tolist().index(2)])
    node = pane.locator("[data-at='1,2']")
    node.hover()
    text = pane.locator(".mh-caption").inner_text()
    assert text.startswith("After layer 0: token 2 “w2” holds ")
    assert abs(float(text.split()[-1].rstrip("%")) / 100 - after) < 0.005
    node.focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.at").startswith("0,")
    page.keyboard.press("Enter")
    assert pane.locator("[data-at^='2,']").count() == 1


def test_text_keeps_its_direction_and_tells_values(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    pane = tab(page, "Attribution")
    assert pane.locator(".mh-text").evaluate("(node) => getComputedStyle(node).direction") == "rtl"
    pane.locator(".mh-word").nth(1).hover()
    expect(pane.locator(".mh-caption")).to_contain_text("-2 (1 of 4 by size)")
    pane.locator(".mh-text").focus()
    # In a text that runs to the left, the arrow to the left goes on.
    page.keyboard.press("ArrowLeft")
    expect(pane.locator(".mh-word").nth(2)).to_have_attribute("aria-selected", "true")
    pane.get_by_role("checkbox", name="Values").check()
    expect(pane.locator(".mh-value").nth(1)).to_have_text("-2")
    choice(pane, "Method").select_option("second")
    expect(pane.locator("tbody tr").first.locator(".mh-num")).to_have_text("3")


def test_image_and_maps_tell_values(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    pane = tab(page, "Image")
    canvas = pane.locator(".mh-image")
    expect(pane.locator(".mh-caption")).to_contain_text("2 × 3 patches")
    box = canvas.bounding_box()
    assert box is not None
    assert box["width"] / box["height"] == pytest.approx(1.5, abs=0.02)
    canvas.hover(position={"x": box["width"] * 0.9, "y": box["height"] * 0.2})
    expect(pane.locator(".mh-caption")).to_have_text("Patch in row 0, column 2: 2")
    canvas.focus()
    page.keyboard.press("ArrowDown")
    expect(pane.locator(".mh-caption")).to_have_text("Patch in row 1, column 2: 5")
    maps = tab(page, "Maps")
    choice(maps, "Measure").select_option("Kept")
    maps.locator("[data-at='1,2']").hover()
    expect(maps.locator(".mh-caption")).to_have_text("Kept, layer 1, head 2: 1")


def test_long_inputs_hold_few_elements_and_say_what_is_missing(visit: Visit, tmp_path: Path) -> None:
    torch.manual_seed(2)
    n = 1500
    store = AttentionStore.from_attention([torch.softmax(torch.randn(1, 2, n, n), -1)], budget_mb=0.1)
    page = visit(view_heads(Panel(store, [f"t{i}" for i in range(n)])).write(tmp_path / "long.html"))
    expect(page.locator(".mh-note").first).to_contain_text("of its mass on average")
    page.locator(".mh-left").focus()
    page.keyboard.press("End")
    expect(token(page, "left", n - 1)).to_be_in_viewport()
    assert page.locator(".mh-item").count() < 120
    share = store.codes(0, 0).share[n - 1]
    expect(page.locator(".mh-kept")).to_contain_text(f"kept: head 0 {100 * share:.1f}%")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_follow_the_system_and_the_button(visit: Visit, everything: Path, scheme: str) -> None:
    page = visit(everything, scheme=scheme)

    def paper() -> float:
        colour = page.locator("#mh-page").evaluate("(node) => getComputedStyle(node).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))

    assert (paper() > 600) == (scheme == "light")
    button = page.get_by_role("button", name="Theme")
    button.click()
    assert paper() > 600
    button.click()
    assert paper() < 150


def test_narrow_screens_have_no_sideways_scroll(visit: Visit, everything: Path) -> None:
    page = visit(everything, width=390)
    for name in page.get_by_role("tab").all_inner_texts():
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_the_widget_shows_the_same_view(visit: Visit, tmp_path: Path, attention: list[torch.Tensor]) -> None:
    view = head_view(attention, WORDS, html_action="return")
    assert view is not None
    empty = tmp_path / "empty.html"
    empty.write_text(f"<!doctype html><title>Notebook</title><style>{style()}</style>")
    page = visit(empty)
    blobs = {name: base64.b64encode(data).decode() for name, data in view.blobs.items()}
    page.evaluate(
        """async ([module, spec, blobs]) => {
          const views = {};
          for (const [name, text] of Object.entries(blobs))
            views[name] = new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
          const { default: widget } = await import("data:text/javascript;charset=utf-8;base64," + module);
          widget.render({ model: { get: (name) => ({ spec, blobs: views })[name] }, el: document.body });
        }""",
        [
            base64.b64encode((script(KINDS) + RENDER).encode()).decode(),
            safe_json(page_spec([view], title=view.title)),
            blobs,
        ],
    )
    token(page, "left", 11).hover()
    expect(page.locator(".mh-details h2")).to_have_text("From 11w11")


def test_the_embedding_names_points_and_is_dragged(visit: Visit, everything: Path) -> None:
    page = visit(everything)
    pane = tab(page, "Queries and keys")
    plane, caption = pane.locator(".mh-plane"), pane.locator(".mh-caption")
    expect(caption).to_contain_text(f"{2 * LAYERS * HEADS * TOKENS} points")
    assert plane.evaluate("(node) => Boolean(node.querySelector('canvas').getContext('webgl2'))")
    choice(pane, "Head").select_option("Layer 1, head 2")
    plane.scroll_into_view_if_needed()
    box = plane.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for step in range(-60, 60):
        page.mouse.move(here := x + 4 * step, y)
        if (told := caption.inner_text()).startswith("Layer"):
            break
    assert told.startswith("Layer 1, head 2: ")
    plane.evaluate("""(node) => {
      window.moves = [];
      new MutationObserver((changes) => changes.forEach(({ target }) => {
        const at = new DOMMatrix(target.style.transform);
        window.moves.push([[...node.children].indexOf(target), Math.round(at.m41), Math.round(at.m42)].join());
      })).observe(node, { subtree: true, attributeFilter: ["style"] });
    }""")
    page.mouse.down()
    page.mouse.move(here - 90, y + 40, steps=3)
    page.mouse.up()
    assert {"0,-90,40", "1,-90,40"} <= set(page.evaluate("window.moves"))
    # Away to where nothing is, and back to where the point was dragged: before and after all is drawn again.
    for _ in range(2):
        page.mouse.move(box["x"] + 2, box["y"] + 2)
        page.mouse.move(here - 90, y + 40)
        assert caption.inner_text() == told
        page.wait_for_timeout(300)
    choice(pane, "Colour").select_option("Position")
    expect(pane.locator(".mh-legend").first).to_contain_text("first")
    plane.focus()
    page.keyboard.press("0")
    assert choice(pane, "Head").input_value() == "All heads"
