"""The table of rows in docs/steering.md: what it names is there, and is of that paper; the page is as it is made."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from manyheads.steer.method import method
from manyheads.steer.personal.form import form
from manyheads.steer.rows import ROWS, Row, table

PAGE = Path(__file__).parents[2] / "docs" / "steering.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_a_row_is_there_or_says_why_not(row: Row) -> None:
    assert row.names or row.elsewhere or row.trained or row.left.startswith("left out: ")
    assert all(row.paper in form(name).source for name in row.trained)
    assert all(row.paper in method(name).source for name in row.names)
    assert all(row.paper in inspect.getsource(importlib.import_module(name)) for name in row.elsewhere)


def test_rows_stand_once_and_in_order() -> None:
    numbers = [row.number for row in ROWS]
    assert numbers == sorted(set(numbers))


def test_the_page_has_the_table_as_it_is_made() -> None:
    assert table() in PAGE.read_text(), "python -m manyheads.steer prints it"
