"""The page, the charts and the terminal's table: complete, escaped, offline, and unmoved by failures and gaps."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyheads.compare.charts import POINTS_PER_CHART, plots, write_png
from manyheads.compare.report import write_report
from manyheads.compare.tables import headline, print_table
from manyheads.runs import page
from manyheads.runs.charts import INKS, PALETTES, SHAPES, log_ticks
from manyheads.runs.page import script_json
from manyheads.runs.tables import bytes_text, count_text

EVIL = "<script>alert('x')</script> & \"quoted\""
LOADING = {"src", "href", "srcset", "data", "action", "poster", "formaction"}


def make_results(*, without: str = "", failed: bool = True) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for place, name in enumerate(("softmax", "moba[block=64]", "hedgehog")):
        same = {"mechanism": name, "status": "done", "error": None, "seconds": 1.0}
        for seed in range(2):
            value = 0.9 - 0.1 * place + 0.01 * seed
            curve = [{"step": s, "loss": 3.0 / s, "value": value if s > 1 else None} for s in (1, 2, 3)]
            cell = same | {"kind": "quality", "task": "recall", "n": 64, "seed": seed, "learning_rate": 0.003}
            cell |= {"best": True, "metric": "accuracy", "higher_is_better": True, "value": value}
            cells.append(cell | {"parameters": 1500 + place, "steps": 3, "curve": curve})
        for n in (64, 128, 256, 512):
            seconds = 1e-6 * n**2 if place == 0 else 1e-4 * n
            cell = same | {"n": n, "causal": True}
            cells.append(cell | {"kind": "speed", "forward_s": seconds, "forward_backward_s": 3 * seconds,
                                 "forward_flops": n * 10**6, "method": "measured"})  # fmt: skip
            cells.append(cell | {"kind": "memory", "peak_bytes": 1000 * n})
        for context in (1024, 4096):
            state = 65536 if place == 2 else 128 * context
            cells.append(same | {"kind": "decode", "context": context, "seconds_per_token": 1e-4 * (1 + place),
                                 "state_bytes": state})  # fmt: skip
    if failed:
        cells.append({"kind": "speed", "mechanism": "mega", "n": 64, "status": "failed", "error": EVIL, "seconds": 0.1})
    kept = [cell for cell in cells if cell["kind"] != without]
    return {
        "schema": 1, "manyheads": "0.1.0", "created": "2030-01-01T00:00:00", "cells": kept,
        "environment": {"torch": "2.13.0", "cpu": "A & B <fast>", "device": "cpu"},
        "experiment": {"seeds": 2, "tasks": [{"name": "recall", "n": 64}], "model": {"dim": 32}, "rates": [0.1, 0.2]},
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, text, and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        {"script": self.scripts, "style": self.styles}.get(self.lasttag, self.words).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


LIBRARIES = "window.vegaEmbed=0;"  # stands in for the real bundle, which takes seconds to make


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """The page of each set of results, by them as JSON: its charts take a second."""
    return {}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, str]) -> Any:
    monkeypatch.setattr(page, "_libraries", lambda: LIBRARIES)

    def page_of(results: dict[str, Any]) -> str:
        told = json.dumps(results)
        if told not in written:
            written[told] = write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")
        return written[told]

    return page_of


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(page).words))


def drawing_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    drawing: dict[str, Any] = json.loads(found[1])
    return drawing


def table_of(results: dict[str, Any], width: int = 100) -> str:
    out = io.StringIO()
    print_table(results, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_the_page_loads_nothing_from_outside(write: Any) -> None:
    page = write(make_results())
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for key in LOADING & attributes.keys():
            assert (attributes[key] or "").startswith("#"), (tag, key, attributes[key])
    assert not re.search(r"https?:|//[a-z]|\bimport\b|\bfetch\b|XMLHttpRequest", "".join(parsed.scripts))
    assert not re.search(r"url\(|@import", "".join(parsed.styles))
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    policy = next(
        a["content"] for tag, a in parsed.elements if tag == "meta" and "content-security-policy" in str(a).lower()
    )
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


@pytest.fixture
def caching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A user's cache directory in which no libraries are kept yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page._libraries.cache_clear()
    yield monkeypatch
    page._libraries.cache_clear()


def test_the_libraries_are_put_together_once_for_each_version(tmp_path: Path, caching: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    caching.setattr("vl_convert.javascript_bundle", lambda *given: (made.append(given), "1 </script> 2\r\n")[1])
    for number, times in (("8", 1), ("8", 1), ("9", 2)):
        caching.setattr(page, "version", lambda package, own=number: own)
        page._libraries.cache_clear()  # as another process
        assert page._libraries() == "1 <\\/script> 2\r\n"
        assert len(made) == times
    (tmp_path / "file").write_text("no folder")
    caching.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    page._libraries.cache_clear()
    assert page._libraries() == "1 <\\/script> 2\r\n"
    assert len(made) == 3


@pytest.mark.usefixtures("caching")
def test_the_real_libraries_are_there_once_and_the_page_is_small(tmp_path: Path) -> None:
    page = write_report(make_results(), tmp_path / "report.html").read_text(encoding="utf-8")
    bundles = [script for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL) if len(script) > 100_000]
    assert len(bundles) == 1
    assert "window.vegaEmbed=" in bundles[0]
    assert len(page.encode()) < 2_000_000
    # Every address in the bundle names a format or a help page; none is loaded, and the page's policy forbids it.
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|\bimport\(|@import""", bundles[0])


def test_names_and_errors_from_outside_are_escaped(write: Any) -> None:
    results = make_results()
    clean = Page(write(results)).count("script")
    results["cells"].append(results["cells"][0] | {"mechanism": EVIL, "task": EVIL, "metric": EVIL, EVIL: EVIL})
    results["environment"][EVIL] = EVIL
    results["experiment"][EVIL] = [EVIL]
    results["created"] = EVIL
    page = write(results)
    parsed = Page(page)
    assert parsed.count("script") == clean == 3
    assert "<script>alert" not in page
    assert EVIL in "".join(parsed.words)
    assert not any("alert" in key for _, attributes in parsed.elements for key in attributes)
    assert any(
        EVIL in json.dumps(spec, ensure_ascii=False).replace('\\"', '"') for spec in drawing_of(page)["specs"].values()
    )


def test_script_json_cannot_end_its_element() -> None:
    text = script_json({"</script>": "<!--"})
    assert "<" not in text
    assert json.loads(text) == {"</script>": "<!--"}


def test_failures_are_rows_with_their_error(write: Any) -> None:
    words = text_of(write(make_results()))
    assert "1 of 37 cells failed (mega)" in words
    assert EVIL in words
    assert "speed, n 64" in words
    assert "No cell failed." in text_of(write(make_results(failed=False)))


def test_every_setting_and_the_environment_are_shown(write: Any) -> None:
    words = text_of(write(make_results()))
    for wanted in ("A & B <fast>", "torch", "2.13.0", "tasks[0].name", "model.dim", "0.1, 0.2", "Counted, not timed"):
        assert wanted in words, wanted


def test_summary_sorts_by_number_through_buttons(write: Any) -> None:
    page = write(make_results())
    summary = page[page.index('<section id="summary"') : page.index('<section id="failures"')]
    parsed = Page(summary)
    heads = [attributes for tag, attributes in parsed.elements if tag == "th" and attributes["scope"] == "col"]
    assert len(heads) == parsed.count("button") == 10
    assert all(head["aria-sort"] == "none" for head in heads)
    recall = [float(a["data-sort"] or "") for tag, a in parsed.elements if tag == "td" and "data-sort" in a]
    assert 0.905 in [round(value, 6) for value in recall]
    assert "0.905 ± 0.007" in text_of(summary)
    assert "n ≈ 100" in text_of(summary)


@pytest.mark.parametrize("kind", ["quality", "speed", "memory", "decode"])
def test_a_missing_section_is_said_and_left_out(kind: str, write: Any) -> None:
    results = make_results(without=kind, failed=False)
    page = write(results)
    assert f"No {kind} cells" in text_of(page)
    assert f"No {kind} cells" in " ".join(table_of(results).split())
    names = drawing_of(page)["specs"].keys()
    gone = {"quality": "learning-recall-loss", "speed": "forward-time", "memory": "memory", "decode": "quality-recall"}
    assert gone[kind] not in names
    assert gone["memory" if kind == "speed" else "speed"] in names


def test_empty_results(write: Any) -> None:
    results = {"schema": 1, "cells": []}
    page = write(results)
    assert "there is no answer yet" in text_of(page)
    assert LIBRARIES not in page
    assert "there is no answer yet" in table_of(results)


def test_results_with_failures_only(write: Any, tmp_path: Path) -> None:
    results = make_results()
    results["cells"] = [
        {"kind": kind, "mechanism": "mega", "status": "failed", "error": None, "task": "recall", "seconds": 0.0}
        for kind in ("quality", "speed", "memory", "decode")
    ]
    assert "no error given" in text_of(write(results))
    assert "4 of 4 cells failed" in table_of(results)
    assert write_png(results, tmp_path) == []


def test_headline_names_the_best() -> None:
    lines = " ".join(headline(make_results()))
    assert "Best at recall: softmax, accuracy 0.905 ± 0.007 (higher is better)." in lines
    assert "Unbeaten at their state size, smallest first: hedgehog, softmax." in lines
    assert "Smallest state at context 4096: hedgehog, 64 KiB." in lines
    assert "Fastest to decode at context 4096: softmax, 0.1 ms a token." in lines
    assert "Fastest causal forward pass at n = 512: moba[block=64], hedgehog, 51.2 ms." in lines


def test_a_mean_over_too_few_seeds_is_marked(write: Any) -> None:
    results = make_results()
    results["cells"][1] |= {"status": "failed", "error": "killed", "value": None}
    page = write(results)
    assert '<span class="bad">0.900</span><small>1 of 2 seeds</small>' in page


def test_headline_does_not_call_a_tie_a_win() -> None:
    results = make_results()
    for cell in results["cells"]:
        if cell["kind"] == "quality" and cell["mechanism"] == "hedgehog":
            cell["value"] = 0.9
    said = " ".join(headline(results))
    assert "Tie at recall: softmax, hedgehog: accuracy 0.905 to 0.900 (higher is better)" in said
    assert "apart by no more than the spread over seeds." in said
    assert "Best at recall" not in said
    results["cells"] = [cell for cell in results["cells"] if cell.get("seed") != 1]
    assert "One seed, so its spread is unknown." in " ".join(headline(results))


def test_table_fits_a_hundred_columns() -> None:
    text = table_of(make_results())
    assert max(map(len, text.splitlines())) <= 100
    softmax = [line.split() for line in text.splitlines() if line.startswith(("softmax", " softmax"))]
    assert softmax[0] == ["softmax", "0.905", "±", "0.007"]
    assert softmax[1][3:5] == ["n^2.00", "reference"]
    assert "moba[block=64]" in text
    assert "failed: mega, speed, n 64: <script>" in text


def test_charts_mark_the_front_and_keep_one_colour_order() -> None:
    made = {plot.name: plot.spec(600) for plot in plots(make_results())}
    for plot in plots(make_results()):
        plot.chart.to_dict(validate=True)  # by altair's schema, which pages are not held to
    assert list(made) == ["quality-recall", "forward-time", "training-time", "memory", "decode-time", "decode-state",
                          "learning-recall-loss", "learning-recall-value"]  # fmt: skip
    points = made["quality-recall"]["data"]["values"]
    assert {row["mechanism"]: row["pareto"] for row in points} == {
        "softmax": True, "moba[block=64]": False, "hedgehog": True
    }  # fmt: skip
    for spec in made.values():
        assert "$schema" not in spec
        domains = re.findall(r'"domain": (\[[^\]]*\])', json.dumps(spec).replace("[block=64]", ""))
        assert {tuple(json.loads(domain)) for domain in domains} == {("softmax", "moba", "hedgehog", "mega")}


def test_long_learning_curves_are_thinned_but_keep_their_ends() -> None:
    results = make_results()
    quality = next(cell for cell in results["cells"] if cell["kind"] == "quality")
    quality["curve"] = [{"step": step, "loss": 1.0 / step, "value": None} for step in range(1, 20001)]
    plot = next(plot for plot in plots(results) if plot.name == "learning-recall-loss")
    rows = plot.spec(600)["data"]["values"]
    steps = [row["step"] for row in rows if row["mechanism"] == "softmax" and row["seed"] == 0]
    assert (steps[0], steps[-1]) == (1, 20000)
    assert len(rows) <= POINTS_PER_CHART


def test_png_files(tmp_path: Path) -> None:
    results = make_results(failed=False)
    results["cells"] = [cell for cell in results["cells"] if cell["kind"] == "decode"]
    written = write_png(results, tmp_path / "charts")
    assert [path.name for path in written] == ["decode-time.png", "decode-state.png"]
    for path in written:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(head[16:20], "big") > 1000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_the_background(scheme: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in PALETTES[scheme]:
        pair = sorted((luminance(colour), luminance(INKS[scheme]["background"])))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3.0, colour


def test_no_two_of_fifty_mechanisms_look_alike() -> None:
    for palette in PALETTES.values():
        assert len({(palette[i % len(palette)], SHAPES[i % len(SHAPES)]) for i in range(50)}) == 50


@pytest.mark.parametrize(("low", "high", "base"), [(0.03, 0.9, 10), (1.0, 2e6, 10), (5.0, 5.0, 10), (300, 2**40, 2)])
def test_ticks_stay_in_range(low: float, high: float, base: int) -> None:
    ticks = log_ticks(low, high, base)
    assert 1 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


def test_figures_in_words() -> None:
    assert [bytes_text(value) for value in (0, 1000, 1536, 2**20, 1023 * 2**20, 2**45, None)] == [
        "0 B", "1000 B", "1.5 KiB", "1 MiB", "1023 MiB", "32 TiB", "–"
    ]  # fmt: skip
    assert [count_text(value) for value in (12, 999.6, 1500, 2.5e9, 3e15)] == ["12", "1 k", "1.5 k", "2.5 G", "3 P"]


def test_where_nothing_follows_the_page_promises_no_sentence(tmp_path: Path) -> None:
    """As of one mechanism whose memory alone was measured: a colon with nothing behind it stood there."""
    results = make_results()
    cells = [one for one in results["cells"] if one["kind"] == "memory"]
    assert cells
    page = write_report(results | {"cells": cells}, tmp_path / "report.html").read_text(encoding="utf-8")
    answer = page[page.index('<div class="answer">') :].partition("</div>")[0]
    assert "<ul></ul>" not in answer
    assert "No sentence follows from what was measured" in answer
