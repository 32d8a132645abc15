"""A study for people and programs: study.html, one page that asks nothing of any other file, and study.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from manyheads.explain.studies.study import Cell, Study, decided, study_class
from manyheads.runs.charts import theme
from manyheads.runs.page import cells_html, charts_html, failures_html, settings_html, table_html, write_page
from manyheads.runs.results import done, number, write_json
from manyheads.runs.tables import Column, Entry

WORDS = {True: "seen", False: "not seen", None: "not decided"}


def write_outputs(study: Study, results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The results with what was found, as they are written."""
    cells = [cell for cell in results["cells"] if done(cell)]
    verdict = decided(study, cells)
    facts = {key: getattr(study, key) for key in ("name", "title", "claim", "reference", "simplified")}
    results = {**results, "study": facts, "verdict": asdict(verdict), "summary": summarise(study, cells)}
    write_json(results, folder / "study.json")
    write_report(study, results, folder / "study.html")
    return results


def summarise(study: Study, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row per condition: mean and standard deviation over seeds of every figure that the short table shows."""
    rows = []
    for label in dict.fromkeys(cell["mechanism"] for cell in cells):
        own = [cell for cell in cells if cell["mechanism"] == label]
        row: dict[str, Any] = {"condition": label, "seeds": len(own)}
        for key in study.columns:
            values = [float(cell[key]) for cell in own if number(cell.get(key)) is not None]
            row[key] = mean(values) if values else None
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def summary_table(study: Study, rows: Sequence[dict[str, Any]]) -> tuple[list[Column], list[list[Entry]]]:
    columns = [Column("condition", number=False), *(Column(title) for title in study.columns.values())]
    return columns, [
        [Entry(row["condition"], row["condition"]), *(_entry(row, k) for k in study.columns)] for row in rows
    ]


def _entry(row: dict[str, Any], key: str) -> Entry:
    value, spread = row[key], row[f"{key}_std"]
    if value is None:
        return Entry("–")
    return Entry(f"{value:.3g}" + (f" ± {spread:.1g}" if spread is not None else ""), value)


def write_report(study: Study, results: dict[str, Any], path: Path) -> Path:
    drawn = study.plots([cell for cell in results["cells"] if done(cell)])
    labels = list(dict.fromkeys(str(cell["mechanism"]) for cell in results["cells"]))
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": max(map(len, labels), default=1),
    }
    setting = f"<p>{escape(study.simplified)}</p><p>Source: {escape(study.reference)}.</p>"
    sections = [
        ("answer", "Answer", _answer_html(results)),
        ("charts", "Figures", charts_html(drawn)),
        ("summary", "Summary", table_html(*summary_table(study, results["summary"]), "Mean ± deviation over seeds.")),
        ("failures", "Failures", failures_html(results, "Condition")),
        ("setting", "How it differs from the paper", setting),
        ("cells", "Every cell", cells_html(results, "condition")),
        ("environment", "Environment", settings_html(results.get("environment", {}))),
        ("settings", "Every setting", settings_html(results.get("experiment", {}))),
    ]
    return write_page(path, f"explain study {study.name}", study.title, results, sections, drawing)


def _answer_html(results: dict[str, Any]) -> str:
    verdict = results["verdict"]
    items = "".join(f"<li>{escape(line)}</li>" for line in verdict["lines"])
    claim = f"<p><strong>Claim.</strong> {escape(results['study']['claim'])}</p>"
    return f'<div class="answer">{claim}<p><strong>Here: {WORDS[verdict["seen"]]}.</strong></p><ul>{items}</ul></div>'


def print_summary(results: dict[str, Any], width: int | None = None) -> None:
    """The claim, the table and what was found, on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = study_class(results["study"]["name"]).columns
    console = Console(highlight=False, width=width, soft_wrap=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("condition")
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in results["summary"]:
        table.add_row(row["condition"], *(_entry(row, key).text for key in columns))
    study, verdict = results["study"], results["verdict"]
    console.print(f"{study['name']}: {study['claim']} ({study['reference']})", markup=False)
    console.print(table)
    console.print(f"claim {WORDS[verdict['seen']]}", markup=False)
    for line in verdict["lines"]:
        console.print(f"  {line}", markup=False)
