"""A personalisation for people: a table for a terminal, and personalised.html with the drawings of all sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.runs.page import settings_html, table_html, write_page
from manyheads.runs.tables import Column, Entry
from manyheads.steer.drawn_report import grid_html, picture_html
from manyheads.steer.report import Table

# Of `measures`: what each is called, whether it is a share, and what it says.
ROWS = (
    ("error", "knows the pictures", False, "error of the velocity under their captions; less is better"),
    ("alike", "draws the like", False, "cosine to the nearest picture of the caption; more is better"),
    ("leak", "looks elsewhere", True, "attention to the subjects outside of their masks; less is better"),
    ("changed", "other drawings changed", False, "root mean square, captions without the subjects; less is better"),
    ("kept", "other drawings right", True, "as the judge of digits reads them; more is better"),
)
NOTES = (
    "Without is the model that knows the subjects' words as the words that they begin as, and has learnt nothing. "
    "Plain is fine-tuning of the same parameters for as many steps on the same batches by the velocity's error alone.",
    "All drawings begin with the same noise. Figures are of this run: a claim needs several seeds.",
)


def sides(record: Mapping[str, Any]) -> list[str]:
    return list(record["measures"])


def table(record: Mapping[str, Any]) -> Table:
    columns = [Column("", number=False), *(Column(side) for side in sides(record)), Column("what", number=False)]
    lines = []
    for key, title, share, what in ROWS:
        values = [record["measures"][side][key] for side in sides(record)]
        if all(value is None for value in values):
            continue
        cells = [Entry(f"{value:.0%}" if share else f"{value:.3f}", value) for value in values]
        lines.append([Entry(title, title), *cells, Entry(what, what)])
    return columns, lines


def write_report(record: Mapping[str, Any], path: Path) -> Path:
    own = record["drawn"]
    drawings = [
        (caption, [picture_html(own[side][row], f"{caption}, {side}", 160) for side in sides(record)])
        for row, caption in enumerate(own["captions"])
    ]
    pictures = [
        (f"{each['name']}: {each['caption']}", [picture_html(each["picture"], each["caption"], 96)])
        for each in record["pictures"]
    ]
    notes = "".join(f"<p>{note}</p>" for note in NOTES)
    sections = [
        ("drawings", "The drawings", grid_html(sides(record), drawings)),
        ("measures", "What it learnt and what it kept", table_html(*table(record), "By side.") + notes),
        ("pictures", "What it learnt from", grid_html(["picture"], pictures)),
        ("method", "The form", settings_html({**record["method"], "model": record["model"]})),
        ("environment", "Environment", settings_html(record["environment"])),
    ]
    results = {"manyheads": record["environment"].get("manyheads", ""), "created": record["created"]}
    words = ", ".join(each["word"] for each in record["subjects"])
    drawing: dict[str, Any] = {"specs": {}, "themes": {}, "widest": 8}
    return write_page(path, "steer", f"{record['model']['name']}: {words}", results, sections, drawing)
