"""One offline page of every mechanism, from what ships: cards, docstrings, measured figures and pictures.

No number in it is typed, and nothing is read from outside: what has not been measured is blank.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from manyheads.catalogue.columns import COLUMNS, written
from manyheads.catalogue.figures import load_figures
from manyheads.catalogue.index import told
from manyheads.catalogue.seen import seen, svg
from manyheads.registry import mechanism_class
from manyheads.runs.files import write_atomically
from manyheads.runs.page import script_json

# What a scatter may be drawn over, and with: the columns with figures, quality being what is better when it is more.
_NUMBERS = {key: column for key, column in COLUMNS.items() if column.write}


def write_board(path: str | Path, names: Iterable[str]) -> Path:
    """Draws and writes the page of these mechanisms."""
    rows = [board_row(name) for name in names]
    columns = [
        {"key": key, "what": column.what, "number": key in _NUMBERS, "most": column.best == "most"}
        for key, column in COLUMNS.items()
        if key not in ("title", "reference")
    ]
    held = {"rows": rows, "columns": columns, "sources": load_figures().sources}
    page = Template(files("manyheads.catalogue").joinpath("board.html").read_text(encoding="utf-8"))
    return write_atomically(path, page.substitute(data=script_json(held), count=len(rows)))


def board_row(name: str) -> dict[str, Any]:
    """All that the page shows of one mechanism."""
    known, figures = told(name), load_figures()
    pictures = seen(mechanism_class(name))
    return {
        **known,
        "cells": {key: written(known, key) for key in COLUMNS},
        "picture": svg(pictures, name),
        "views": list(dict.fromkeys(f"{picture.pattern}: {picture.words}" for picture in pictures)),
        "measured": {source: figures.of(name, source) for source in figures.sources if figures.of(name, source)},
        "curves": _curves(name),
    }


def _curves(name: str) -> list[dict[str, Any]]:
    """Forward milliseconds over the length, or over an image's side: `ms_2048` and `ms_at_32` of the results."""
    found = []
    for source, prefix, over in (("linear", "ms_", "tokens"), ("vision", "ms_at_", "side of the image")):
        for row in load_figures().of(name, source):
            points = [[int(key.removeprefix(prefix)), row[key]] for key in row if key.removeprefix(prefix).isdigit()]
            if points:
                found.append({"over": over, "points": sorted(points)})
    return found
