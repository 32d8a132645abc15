"""What was measured of each mechanism, as it ships: `figures.json`, made by `benchmarks/figures.py`.

Nothing in it is typed by hand, and what has not been measured is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Figures:
    """sources: by result, the benchmark, the file and the environment. rows: by mechanism, its rows of each result as
    the benchmark wrote them."""

    sources: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Mapping[str, list[Mapping[str, Any]]]]

    def of(self, name: str, source: str) -> list[Mapping[str, Any]]:
        """The rows of one mechanism in one result; none where it was not measured."""
        return list(self.rows.get(name, {}).get(source, []))

    def summary(self, name: str) -> dict[str, float | int | None]:
        """One number a column, None where it was not measured.

        recall, digits: accuracy of quick recall and quick digits. exponent: of forward time over the tokens, or over
        the cells of an image. ms: forward milliseconds at 8,192 tokens. bytes: the state behind 65,536 tokens. peer:
        forward time over that of another package at the longest input, of several packages the least favourable.
        """
        length = _first(self.of(name, "linear"))
        cells = _first([row for row in self.of(name, "vision") if "exponent" in row])
        return {
            "recall": _first(self.of(name, "recall")).get("accuracy"),
            "digits": _first(self.of(name, "digits")).get("accuracy"),
            "exponent": (length or cells).get("exponent"),
            "ms": length.get("ms_8192"),
            "bytes": length.get("state_bytes_64k"),
            "peer": _peer(self.of(name, "peers")),
        }


def _first(rows: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    return rows[0] if rows else {}


def _peer(rows: list[Mapping[str, Any]]) -> float | None:
    timed = [row for row in rows if row.get("pass") == "forward" and "ratio" in row]
    longest = max((row["n"] for row in timed), default=0)
    return max((row["ratio"] for row in timed if row["n"] == longest), default=None)


@cache
def load_figures() -> Figures:
    """The figures of this release."""
    return parse_figures(files("manyheads.catalogue").joinpath("figures.json").read_text(encoding="utf-8"))


def parse_figures(text: str) -> Figures:
    """ValueError where the text is of another release's format."""
    held = json.loads(text)
    found = held.get("format") if isinstance(held, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"figures.json is of format {found}, this release reads {FORMAT}: install manyheads again, or run "
            "`python benchmarks/figures.py`"
        )
    return Figures(held["sources"], held["rows"])
