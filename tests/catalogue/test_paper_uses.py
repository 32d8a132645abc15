"""A paper that an intervention is named for leads to it, and not to "not in manyheads"."""

from __future__ import annotations

import pytest

from manyheads.catalogue.entries import papers
from manyheads.steer.rows import ROWS


def test_every_intervention_by_name_is_what_its_paper_leads_to() -> None:
    known = {paper["id"]: paper for paper in papers()}
    for row in ROWS:
        paper = known[row.number]
        if row.names and not paper["mechanisms"]:
            assert any(name in paper["use"] for name in (*row.names, "word_maps")), f"{row.number}: {paper['use']!r}"
        elif row.elsewhere and not paper["mechanisms"]:
            assert paper["use"], f"{row.number}, {row.title}: {row.elsewhere} is not told"


@pytest.mark.parametrize(
    ("number", "word"),
    [(17, "disendiff"), (202, "attencraft"), (222, "mcpl"), (73, "conductor"), (397, "plug-and-play")],
)
def test_a_row_is_of_its_paper(number: int, word: str) -> None:
    (paper,) = [paper for paper in papers() if paper["id"] == number]
    (row,) = [row for row in ROWS if row.number == number]
    assert word in f"{paper['title']} {paper['about']}".lower()
    assert word in row.title.lower()
