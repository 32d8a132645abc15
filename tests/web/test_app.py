"""The app in a real browser: what is typed, pressed and chosen does what it says, and nothing goes outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from serving import Served, serving

from manyheads.hosts.loading import load_model

PROMPT = "The pass key is 40718. Remember it.\nWhat is the pass key? The pass key is "
# Tries everything that a report must not do.
HOSTILE = """<!doctype html><title>Report</title><h1>Here</h1><img src="http://outside.example/x.png">
<script>
const tried = {};
for (const [name, act] of Object.entries({
  cookie: () => document.cookie, parent: () => parent.document.title, storage: () => localStorage.length,
})) { try { tried[name] = String(act()); } catch (error) { tried[name] = "refused"; } }
fetch("/api/model").then(() => (tried.fetch = "read"), () => (tried.fetch = "refused"))
  .then(() => { document.querySelector("h1").textContent = JSON.stringify(tried); });
</script>"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "run").mkdir()
    (folder / "run" / "report.html").write_text(HOSTILE)
    (folder / "run" / "results.json").write_text("{}")
    with serving(load_model(), reports=folder) as running:
        yield running


Open = Callable[..., Page]


@pytest.fixture
def enter(browser: Browser, served: Served) -> Iterator[Open]:
    """enter(width=, scheme=, loud=): the app's page. When the test ends it must have asked nothing outside, and, but
    for loud ones, have written nothing on the console."""
    contexts: list[Any] = []
    noise: list[str] = []

    def open_page(width: int = 1100, scheme: str = "light", loud: bool = False) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        cookie = {"name": served.session.cookie_name, "value": served.session.cookie, "url": served.url}
        context.add_cookies([{**cookie, "httpOnly": True, "sameSite": "Strict"}])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        if not loud:
            page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("requestfinished", lambda asked: own(asked.url) or noise.append(asked.url))
        page.goto(served.url)
        expect(page.get_by_text("tokens of at most 4,096")).to_be_visible()
        return page

    def own(url: str) -> bool:
        return url.startswith((f"{served.url}/", "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in noise if "GPU stall due to ReadPixels" not in line] == []


def typed(page: Page, text: str) -> None:
    page.get_by_label("Text", exact=True).fill(text)
    expect(page.get_by_text(f"{len(text.encode())} tokens of")).to_be_visible()


def shares(page: Page, answer: str) -> tuple[float, float]:
    """Before and after, as the table tells them."""
    row = page.locator(".ms-answers tbody tr").filter(has=page.get_by_text(answer, exact=True))
    before, after = row.locator(".mh-bar").all_inner_texts()
    return float(before.strip("<%")), float(after.strip("<%"))


def test_a_text_is_typed_and_explained(enter: Open) -> None:
    page = enter()
    typed(page, "<b>The</b> hill שלום")
    for name in ("logit-flow", "relevance", "attention-gradient", "input-gradient", "value-norm"):
        page.get_by_role("checkbox", name=name, exact=True).uncheck()
    page.get_by_label("Layers").fill("1,3")
    page.get_by_role("checkbox", name="Score all heads").uncheck()
    page.get_by_role("button", name="Explain", exact=True).click()
    frame = page.frame_locator("iframe")
    expect(frame.get_by_role("heading", level=1)).to_have_text("byte_llama: what its heads do")
    expect(frame.locator(".mh-text")).to_contain_text("<b>The</b>")
    methods = frame.get_by_role("combobox", name="Method").locator("option").all_inner_texts()
    assert [name.split(" ")[0] for name in methods] == ["raw-attention", "rollout"]
    frame.get_by_role("tab", name="Head view").click()
    assert frame.get_by_role("combobox", name="Layer").locator("option").all_inner_texts() == ["1", "3"]
    frame.locator(".mh-left [data-index='4']").hover()
    expect(frame.locator(".mh-details h2")).to_contain_text("From 4")
    expect(page.get_by_role("status").filter(has_text="done")).to_be_visible()


def test_what_cannot_be_done_is_said(enter: Open) -> None:
    page = enter(loud=True)
    go = page.get_by_role("button", name="Explain", exact=True)
    page.get_by_label("Layers").fill("9")
    go.click()
    expect(page.get_by_role("alert")).to_contain_text("0 to 3; there is no 9")
    page.get_by_label("Layers").fill("")
    page.get_by_label("Text", exact=True).fill("  ")
    expect(page.get_by_text("Type some words.")).to_be_visible()
    go.click()
    expect(page.get_by_role("alert")).to_contain_text("is empty")
    page.get_by_label("Text", exact=True).fill("a" * 5000)
    expect(page.get_by_text("5,000 tokens, byte_llama has positions for 4,096")).to_be_visible()
    page.route("**/api/explain", lambda route: route.abort())
    go.click()
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    assert page.locator("iframe").count() == 0


def test_silencing_heads_by_keyboard_shows_the_change(enter: Open) -> None:
    page = enter()
    typed(page, PROMPT)
    page.get_by_role("tab", name="Explain").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Intervene")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("combobox", name="Intervention")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Factor")).to_have_value("0")
    expect(page.locator(".ms-span")).to_be_hidden()
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Layer 0, head 0")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    for _ in range(4):
        page.keyboard.press("Space")
        page.keyboard.press("ArrowRight")
    expect(page.get_by_text("4 of 32 heads")).to_be_visible()
    page.get_by_role("combobox", name="Attribution").select_option("input-gradient")
    page.get_by_label("Answer", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".ms-moved")).to_contain_text("of the probability moved")
    before, after = shares(page, "4")
    assert before > 50 > 20 > after
    frame = page.frame_locator("iframe")
    expect(frame.get_by_role("heading", level=1)).to_have_text("Which tokens count for '4': input-gradient")
    expect(frame.get_by_role("combobox", name="Method").locator("option")).to_have_text(["change", "before", "after"])
    frame.get_by_role("combobox", name="Method").select_option("before")
    own = frame.locator(".mh-word").nth(PROMPT.index("4")).get_attribute("aria-label")
    assert own is not None
    assert own.startswith("4: ")
    assert abs(float(own[3:])) > 0


def test_boosting_a_span_and_boosting_by_nothing(enter: Open) -> None:
    page = enter()
    typed(page, PROMPT)
    page.get_by_role("tab", name="Intervene").click()
    go = page.get_by_role("button", name="Intervene", exact=True)
    go.click()
    expect(page.get_by_role("alert").locator("visible=true")).to_contain_text("Choose the tokens of the span first")
    tokens = page.get_by_role("listbox", name="Tokens of the span")
    at = PROMPT.index("40718")
    tokens.get_by_role("option").nth(at + 4).click()
    tokens.get_by_role("option").nth(at).click()
    expect(tokens.locator("[aria-selected=true]")).to_have_text(list("40718"))
    page.get_by_label("Factor").fill("1")
    page.get_by_role("combobox", name="Attribution").select_option("saliency")
    go.click()
    expect(page.locator(".ms-moved")).to_have_text("Nothing changed: the probabilities are exactly the same.")
    before, after = shares(page, "4")
    assert before == after > 50
    page.get_by_label("Strength by slider").focus()
    page.keyboard.press("Home")
    expect(page.get_by_label("Factor")).to_have_value("0")
    # By keys: from the place that was pressed last, two to the right, alone.
    tokens.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(tokens.locator("[aria-selected=true]")).to_have_text(["0"])
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    expect(tokens.locator("[aria-selected=true]")).to_have_text(["4", "0"])
    go.click()
    expect(page.locator(".ms-moved")).to_contain_text("of the probability moved")
    assert shares(page, "4")[1] < 20


def test_a_report_is_shown_and_kept_apart(enter: Open, served: Served) -> None:
    page = enter(loud=True)
    asked: list[str] = []
    page.on("response", lambda answer: asked.append(answer.url))
    page.get_by_role("tab", name="Reports").click()
    expect(page.get_by_label("Text", exact=True)).to_be_hidden()
    row = page.get_by_role("row").filter(has_text="run/report.html")
    expect(row).to_contain_text("compare")
    row.get_by_role("button", name="run/report.html").click()
    told = '"cookie":"refused",%s"storage":"refused","fetch":"refused"}'
    expect(page.frame_locator("iframe").get_by_role("heading")).to_have_text("{" + told % '"parent":"refused",')
    # Alone it is its own parent, and still in a corner of its own.
    page.goto(f"{served.url}/reports/run/report.html")
    expect(page.get_by_role("heading")).to_contain_text(told % '"parent":"Report",')
    assert [url for url in asked if "outside" in url or "/api/model" in url] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_the_systems_colours(enter: Open, scheme: str) -> None:
    page = enter(width=390, scheme=scheme)
    colour = page.locator("#mh-page").evaluate("(node) => getComputedStyle(node).backgroundColor")
    assert (sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) > 600) == (
        scheme == "light"
    )
    for name in ("Explain", "Intervene", "Reports"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        # Everything that can be worked has a name.
        unnamed = page.locator("button:visible, input:visible, select:visible, textarea:visible").evaluate_all(
            "(all) => all.filter((one) => !(one.ariaLabel || one.textContent || one.labels?.[0]?.textContent)).length"
        )
        assert unnamed == 0, name
