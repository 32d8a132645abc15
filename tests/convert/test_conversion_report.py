"""The page of a conversion: what it says, and that it works in a browser without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyheads.convert.report import headline, plots, write_report

EVIL = "<script>alert('x')</script> & \"quoted\""


def row(title: str, stage: str, value: int | None, bits: float, keys: int, cache: int) -> dict[str, Any]:
    return {
        "title": title, "stage": stage, "value": value, "bits_per_token": bits, "kl_bits": bits - 1, "passkeys": keys,
        "needles": keys // 2, "keys": 10, "top_agreement": 0.5, "greedy_agreement": 0.25, "parameters": 900,
        "cache_bytes": cache, "cache_bytes_per_token": cache / 256, "prefill_s": 0.5, "decode_s": 0.01,
        "prefill_ratio": 0.9, "decode_ratio": 0.8, "tokens": 256, "windows": 2, "seconds": 1.0,
    }  # fmt: skip


def record(*, healed: bool = True) -> dict[str, Any]:
    rows = [row("original", "original", None, 1.0, 10, 1024)]
    for heads in (2, 1):
        rows.append(row(f"gqa {heads}", "right after", heads, 4.0 - heads, 0, 256 * heads))
        if healed:
            rows.append(row(f"gqa {heads}, healed", "healed", heads, 2.0 - heads / 4, 4 * heads, 256 * heads))
    rows += [row("control, healed", "control", None, 0.9, 10, 1024)] * healed
    return {
        "title": EVIL, "created": "2030-01-01T00:00:00", "source": {"name": EVIL}, "method": "gqa",
        "knob": "--kv-heads", "settings": {"values": [2, 1]}, "rows": rows,
        "environment": {"manyheads": "0.1.0", "cpu": "A & B", "device": "cpu"},
    }  # fmt: skip


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_works_offline(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = write_report(record(), tmp_path / "conversion.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.chart svg').length === 4")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert EVIL in page.locator("h1").inner_text()
    page.get_by_role("button", name="Bits per token").first.click()
    names = page.locator("table.sorts").first.locator("tbody tr th")
    assert (names.first.inner_text(), names.last.inner_text()) == ("control, healed", "gqa 1")
    context.close()


def test_the_curves_go_over_the_knob_and_the_original_lies_across() -> None:
    drawn = {plot.name: plot.spec(400) for plot in plots(record())}
    for plot in plots(record()):
        plot.chart.to_dict(validate=True)  # by altair's schema, which pages are not held to
    assert list(drawn) == ["bits-per-token", "kl-bits", "passkeys", "greedy-agreement"]
    across, line, _ = drawn["passkeys"]["layer"]
    assert [point["figure"] for point in across["data"]["values"]] == [1.0, 1.0]
    points = [(each["stage"], each["value"], each["figure"]) for each in line["data"]["values"]]
    assert points == [("right after", 2, 0.0), ("healed", 2, 0.8), ("right after", 1, 0.0), ("healed", 1, 0.4)]
    # Less is better: up stays the better side.
    assert drawn["kl-bits"]["layer"][1]["encoding"]["y"]["scale"]["reverse"] is True


def test_the_answer_takes_the_last_line_of_every_value() -> None:
    said = headline(record())
    assert said[0].startswith("gqa 2, healed: 1.000 to 1.500 bits per token (+0.500), 8 of 10 hidden keys")
    assert "50% of the cache" in said[0]
    assert said[1].startswith("gqa 1, healed: ")
    assert said[2] == "control, healed: 0.900 bits per token, 10 of 10 hidden keys."
    assert headline(record(healed=False))[1].startswith("gqa 1: 1.000 to 3.000")


def test_a_model_that_broke_has_a_page_too(tmp_path: Path) -> None:
    found = record()
    found["rows"][1] |= {"bits_per_token": float("nan"), "kl_bits": float("inf")}
    text = write_report(found, tmp_path / "conversion.html").read_text()
    assert "<td data-sort" in text
    assert ">nan</td>" in text
    values = [plot.spec(400)["layer"][1]["data"]["values"][0]["figure"] for plot in plots(found)]
    assert values == [None, None, 0.0, 0.25]
