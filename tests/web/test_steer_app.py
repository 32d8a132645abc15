"""Steering in the app: its form in a real browser, its route as a client asks it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from serving import Served, ended, serving

from manyheads.hosts.loading import load_model
from manyheads.hosts.seeing import load_seeing
from manyheads.serve.steering import steer_facts
from manyheads.steer.method import methods
from manyheads.tasks.scenes import held_out, pictures

REGIONS = '{"a 3":[4,0,12,8],"a 7":[4,8,12,16]}'
DRAWN = {"text": "a 3 and a 7", "name": "regional_prompts", "steps": 2}


@pytest.fixture(scope="module")
def drawing() -> Iterator[Served]:
    with serving(load_model("dit")) as running:
        yield running


@pytest.fixture(scope="module")
def reading() -> Iterator[Served]:
    with serving(load_model()) as running:
        yield running


@pytest.fixture(scope="module")
def seeing() -> Iterator[Served]:
    with serving(load_seeing("vlm").loaded) as running:
        yield running


@pytest.fixture
def visit_app(browser: Browser) -> Iterator[Any]:
    """visit_app(served): its page. It must ask nothing outside and write nothing on the console."""
    contexts: list[Any] = []
    noise: list[str] = []

    def open_page(served: Served) -> Page:
        context = browser.new_context(viewport={"width": 1100, "height": 900})
        cookie = {"name": served.session.cookie_name, "value": served.session.cookie, "url": served.url}
        context.add_cookies([{**cookie, "httpOnly": True, "sameSite": "Strict"}])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        inside = (f"{served.url}/", "data:", "blob:")
        page.on("requestfinished", lambda asked: asked.url.startswith(inside) or noise.append(asked.url))
        page.goto(served.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []


def test_a_slider_draws_again(visit_app: Any, drawing: Served) -> None:
    page = visit_app(drawing)
    page.get_by_label("Caption").fill("a 3 and a 7")
    page.get_by_role("combobox", name="Intervention").select_option("regional_prompts")
    page.get_by_label("regions").fill(REGIONS)
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_role("button", name="Run without and with").click()
    expect(page.locator(".ms-said")).to_contain_text("of the pixels change visibly", timeout=60_000)
    slider = page.get_by_label("Strength by slider")
    assert slider.evaluate("own => [own.min, own.max, own.value]") == ["0", "1", "1"]
    drawn = page.get_by_role("region", name="Drawings").locator("canvas")
    assert drawn.count() == 2

    def levels(place: int) -> list[int]:
        found: list[int] = drawn.nth(place).evaluate("own => [...own.getContext('2d').getImageData(0, 0, 16, 16).data]")
        return found

    without, given = levels(0), levels(1)
    assert without != given
    assert page.get_by_role("region", name="Word maps").locator("canvas").count() == 12
    # The neutral setting is marked and one press away; a slider that moves draws by itself.
    page.get_by_role("button", name="Neutral: 0").click()
    assert slider.input_value() == "0"
    expect(page.locator(".ms-said")).to_contain_text("The drawing stays as it was, to the bit.", timeout=60_000)
    assert levels(0) == levels(1) == without


def test_words_are_marked_and_errors_are_text(visit_app: Any, reading: Served) -> None:
    page = visit_app(reading)
    page.get_by_role("tab", name="Steer").click()
    page.get_by_role("combobox", name="Intervention").select_option("boost")
    assert page.locator(".ms-tick").evaluate("own => getComputedStyle(own).getPropertyValue('--at')") == "0.05"
    page.get_by_role("button", name="Run without and with").click()
    expect(page.locator(".mh-pane:not([hidden]) .mh-error")).to_contain_text("no span 'text'", timeout=60_000)
    page.get_by_label("Words of the text").fill("40718")
    page.get_by_role("button", name="Run without and with").click()
    expect(page.get_by_role("region", name="Answers")).to_contain_text("40718", timeout=60_000)
    expect(page.locator(".ms-said")).to_contain_text("Attention on the marked words")


def asked(served: Served, **body: Any) -> tuple[httpx.Response, dict[str, Any] | None]:
    with served.client() as client:
        answer = client.post("/api/steer", json=body)
        return answer, ended(client, answer) if answer.status_code == 202 else None


def test_a_picture_is_read(seeing: Served) -> None:
    out = BytesIO()
    pictures(held_out(1, kind="exists", seed=3).pixels)[0].save(out, "PNG")
    image = base64.b64encode(out.getvalue()).decode()
    body = {"text": "Is there a 3?", "name": "vision_heads", "arguments": {"scale": "3"}, "new": 2}
    _, job = asked(seeing, **body, image=image)
    assert job is not None
    assert job["state"] == "done", job
    assert set(job["result"]["attention"]) == {"image", "sinks"}
    assert set(job["result"]["answers"]) == {"without", "with", "same"}
    for given, message in (
        (None, "choose a picture"),
        (base64.b64encode(b"no picture").decode(), "the picture is no image that can be read"),
        ("a", "did not come in whole"),
    ):
        _, job = asked(seeing, **body, image=given)
        assert job is not None
        assert message in job["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**DRAWN, "arguments": {}}, "regional_prompts needs regions"),
        ({**DRAWN, "arguments": {"regions": '{"a 3":[0,0,99,8]}'}}, "is no region"),
        ({**DRAWN, "arguments": {"regions": REGIONS, "steps": "7"}}, "outside of the schedule"),
        ({**DRAWN, "name": "boost", "arguments": {}}, "dit is a diffusion model"),
        ({**DRAWN, "name": "regional_promts", "arguments": {}}, "did you mean 'regional_prompts'"),
        ({**DRAWN, "text": "a cat", "arguments": {"regions": REGIONS}}, "does not know 'cat'"),
        ({**DRAWN, "name": "steer", "arguments": {"file": "/etc/passwd"}}, "names a file"),
    ],
)
def test_what_is_refused_is_said(drawing: Served, body: dict[str, Any], message: str) -> None:
    _, job = asked(drawing, **body)
    assert job is not None
    assert job["state"] == "failed"
    assert message in job["error"]


def test_sizes_are_bounded_and_strangers_kept_out(drawing: Served) -> None:
    good = {**DRAWN, "arguments": {"regions": REGIONS}}
    for more in ({"steps": 41}, {"image": "A" * 800_005}, {"arguments": {"regions": "x" * 2001}}, {"paths": "x"}):
        answer, _ = asked(drawing, **{**good, **more})
        assert answer.status_code == 422
    with drawing.stranger() as stranger:
        assert stranger.post("/api/steer", json=good).status_code == 401


def test_a_drawing_can_be_given_up(drawing: Served) -> None:
    with drawing.client() as client:
        job = client.post("/api/steer", json={**DRAWN, "steps": 40, "arguments": {"regions": REGIONS}}).json()
        client.post(f"/api/jobs/{job['id']}/cancel", json={})
        while (now := client.get(f"/api/jobs/{job['id']}").json())["state"] in ("waiting", "running"):
            pass
    assert now["state"] == "cancelled"


def test_what_a_form_offers(drawing: Served, reading: Served) -> None:
    """Nothing that cannot do without a file of the server's; every strength with its slider."""
    for served, kind in ((drawing, "diffusion"), (reading, "language")):
        with served.client() as client:
            offered = client.get("/api/model").json()["steer"]
        assert offered["kind"] == kind
        names = {own["name"] for own in offered["methods"]}
        assert names == {own.name for own in methods(kind) if not set(own.files) & set(own.needs)}
        assert all((own["reach"] is not None) == (own["strength"] is not None) for own in offered["methods"])
        typed = [argument["name"] for own in offered["methods"] for argument in own["arguments"]]
        assert not set(typed) & {"file", "gates", "interpreters"}
    assert steer_facts(load_model("dit")) is not None
