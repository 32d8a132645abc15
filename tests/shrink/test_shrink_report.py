"""The report of a shrink run: figures as they were measured, words, tables, and a page that works in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from manyheads.runs import page as shared
from manyheads.shrink.report import plots, write_outputs
from manyheads.shrink.summary import depth_table, headline, print_summary, summarise, summary_table

EVIL = "<script>alert('x')</script> & \"quoted\""
KIB = 1024


def cost(title: str, held: int, seconds: float) -> dict[str, Any]:
    own = {
        "cache_bytes": held,
        "prefill_s": 0.5,
        "decode_s": seconds,
        "prefill_peak_bytes": 900,
        "decode_peak_bytes": 9,
    }
    dense = {"cache_bytes": 1000 * KIB, "prefill_s": 0.25, "decode_s": 0.02, "prefill_peak_bytes": 1000}
    return {"kind": "cost", "mechanism": title, "task": "cost", "n": 1024, "status": "done", "error": None,
            "seconds": 1.0, **own, **{f"dense_{key}": value for key, value in dense.items()},
            "dense_decode_peak_bytes": 0}  # fmt: skip


def answers(title: str, task: str, n: int, by_depth: list[tuple[float, float]], held: float) -> dict[str, Any]:
    right = sum(share for _, share in by_depth) / len(by_depth)
    return {"kind": "answers", "mechanism": title, "task": task, "n": n, "status": "done", "error": None,
            "seconds": 2.0, "accuracy": right, "answers": 2 * len(by_depth), "by_depth": [list(p) for p in by_depth],
            "cache_bytes": held}  # fmt: skip


def text(title: str, bits: float, **more: float) -> dict[str, Any]:
    return {"kind": "text", "mechanism": title, "task": "perplexity", "n": 1024, "status": "done", "error": None,
            "seconds": 2.0, "bits_per_token": bits, "perplexity": 2**bits, "tokens": 99, "cache_bytes": 500 * KIB,
            **more}  # fmt: skip


def make_results(policies: dict[str, float] | None = None, *, failed: bool = False) -> dict[str, Any]:
    """policies: title -> share of the bytes. Those that hold less know fewer of the early keys."""
    policies = {"streaming, 64 tokens": 0.25} if policies is None else policies
    cells = [answers("dense", "passkey", n, [(0.0, 1.0), (1.0, 1.0)], n * KIB) for n in (512, 1024)]
    cells.append(text("dense", 2.0))
    for title, share in policies.items():
        early = 1.0 if share >= 0.5 else 0.0
        cells += [answers(title, "passkey", n, [(0.0, early), (1.0, 1.0)], share * n * KIB) for n in (512, 1024)]
        cells += [text(title, 2.5, kl_bits=0.1 / share, top_agreement=0.9, greedy_agreement=0.75, greedy_tokens=8)]
        cells.append(cost(title, int(share * 1000 * KIB), 0.01))
    if failed:
        lost = {"kind": "answers", "mechanism": title, "task": "recall", "n": 512, "status": "failed", "error": EVIL}
        cells.append(lost | {"seconds": 0.1})
    variants = [{"title": title, "policy": title.split(",")[0], "budget": []} for title in policies]
    return {
        "schema": 1, "manyheads": "0.1.0", "created": "2030-01-01T00:00:00", "cells": cells, "variants": variants,
        "environment": {"cpu": "A & B <fast>", "device": "cpu"}, "model": {"name": "some/model", "parameters": 12},
        "experiment": {"tasks": ["passkey", "perplexity"], "trials": 2},
    }  # fmt: skip


MANY = {f"{name}, ratio {ratio}": 1 - ratio for name in ("streaming", "h2o") for ratio in (0.25, 0.5, 0.75)}


def test_figures_of_a_row() -> None:
    dense, row = summarise(make_results())
    assert (dense["title"], row["policy"]) == ("dense", "streaming")
    assert (dense["passkey"], row["passkey"], row["passkey_answers"]) == (1.0, 0.5, 8)
    assert row["passkey_bytes"] == 0.25 * 768 * KIB
    assert (row["share"], dense["share"], row["context"]) == (0.25, 1.0, 1024)
    assert (dense["decode_s"], row["decode_s"]) == (0.02, 0.01)
    assert row["needle"] is None
    assert row["kl_bits"] == 0.4


def test_answers_weigh_by_their_number() -> None:
    results = make_results()
    results["cells"][4]["answers"] = 12
    results["cells"][4]["accuracy"] = 1.0
    assert summarise(results)[1]["passkey"] == pytest.approx((0.5 * 4 + 1.0 * 12) / 16)


def test_words_for_one_and_for_many() -> None:
    (line,) = headline(make_results())
    assert line.startswith("streaming, 64 tokens: 25% of the dense cache's bytes (250 KiB of 1000 KiB)")
    assert "passkey 100% → 50%" in line
    assert "bits per token 2.000 → 2.500" in line
    assert "×0.50 the dense cache's time" in line
    lines = headline(make_results(MANY))
    assert "passkey answers (100% right): streaming, ratio 0.5, with 50% of the bytes." in lines[0]
    assert "streaming, ratio 0.75" in lines[1]
    assert headline(make_results({}))[0].startswith("Nothing was shrunk")
    bad = dict.fromkeys(MANY, 0.25)
    assert headline(make_results(bad))[0].startswith("No policy here keeps 95% of the dense cache's passkey")
    assert headline(make_results(failed=True))[-1].startswith("1 of 8 cells failed")


def test_tables_hold_what_was_measured() -> None:
    columns, lines = summary_table(make_results())
    titles = [column.title for column in columns]
    assert titles[:3] == ["Policy", "Cache", "Passkey"]
    assert "Needle" not in titles
    assert [line[titles.index("Per token")].notes for line in lines] == [(), ("×0.5",)]
    columns, lines = depth_table(make_results())
    assert [(column.title, column.note) for column in columns[2:]] == [
        ("512", "depth 0%"), ("512", "depth 100%"), ("1,024", "depth 0%"), ("1,024", "depth 100%")
    ]  # fmt: skip
    assert [entry.text for entry in lines[1]] == ["streaming, 64 tokens", "passkey", "0%", "100%", "0%", "100%"]


def test_the_terminal_gets_both_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_summary(make_results(failed=True))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for words in ("Passkey", "Peak, decoding", "(×0.5)", "(25%)", "failed: streaming"):
        assert words in out


def test_charts_have_a_line_per_policy() -> None:
    drawn = {plot.name: plot for plot in plots(make_results(MANY))}
    assert set(drawn) == {"passkey", "bits", "kl", "greedy", "depth-passkey"}
    for plot in drawn.values():
        plot.chart.to_dict(validate=True)  # by altair's schema, which pages are not held to
    spec = drawn["passkey"].spec("container")
    points = spec["layer"][1]["data"]["values"]
    assert len(points) == 7
    assert {point["policy"] for point in points} == {"dense", "streaming", "h2o"}
    assert spec["layer"][0]["data"]["values"][0]["policy"] == "dense"
    assert [plot.name for plot in plots(make_results({}))] == ["depth-passkey"]


def test_json_has_cells_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_libraries", lambda: "")
    results = make_results(failed=True)
    results["cells"][2]["perplexity"] = float("inf")
    write_outputs(results, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["summary"][1]["passkey"] == 0.5
    assert read["cells"][2]["perplexity"] is None
    page = (tmp_path / "report.html").read_text()
    assert EVIL not in page
    assert "A &amp; B &lt;fast&gt;" in page
    assert "alert(&#x27;x&#x27;)" in page
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page)
    assert "manyheads shrink: some/model" in page


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_outputs(make_results(MANY, failed=True), folder)
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_works_offline(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_function("document.querySelectorAll('.chart svg').length === 5")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("table.sorts").first.locator("tbody tr").count() == 7
    page.get_by_role("button", name="Cache").first.click()
    rows = page.locator("table.sorts").first.locator("tbody tr th")
    assert rows.first.inner_text().endswith("ratio 0.75")
    assert rows.last.inner_text() == "dense"
    context.close()


def test_nothing_in_the_words_is_left_of_mechanisms(page_file: Path) -> None:
    body = page_file.read_text().split("<script")[0]
    assert "mechanism" not in body
