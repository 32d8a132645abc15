"""A run for people: one offline HTML page.

Names, errors and settings come from outside: everything written into the page goes through `html.escape`, and what
goes into a script is JSON without a `<`.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from manyheads.runs.files import cache_folder, write_atomically, write_durably
from manyheads.runs.results import Cell, Results, cells_of, done, failures_of, number
from manyheads.runs.tables import Column, Entry, where

_BUNDLE = 1  # counts up when what is made of the libraries changes, so that those kept by older releases are left


def write_page(
    path: str | Path,
    command: str,
    title: str,
    results: Results,
    sections: Sequence[tuple[str, str, str]],
    drawing: Mapping[str, Any],
) -> Path:
    """sections: key, title and HTML each, the first without an entry in the navigation. drawing: specs, themes and
    the widest legend entry, as the page's script takes them."""
    template = Template(files("manyheads.runs").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        command=_safe(command),
        title=_safe(title),
        subtitle=_safe(f"manyheads {results.get('manyheads', '')} · {results.get('created', '')}"),
        navigation=" ".join(f'<a href="#{key}">{_safe(words)}</a>' for key, words, _ in sections[1:]),
        body="\n".join(_section_html(*section) for section in sections),
        charts=script_json(drawing),
        libraries=_libraries() if drawing["specs"] else "",
    )
    return write_atomically(path, page)


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, so nothing in it can end the element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@cache
def _libraries() -> str:
    """vega-embed with all that it needs, as one script. It takes three seconds to put together and is the same for the
    same versions: kept in the user's cache directory, where that can be written."""
    from .charts import vega_lite_version

    lite = vega_lite_version()
    name = f"vega-embed-{_BUNDLE}-{version('vl-convert-python')}-{lite}.js"
    with suppress(OSError, ValueError):
        return (cache_folder() / "pages" / name).read_bytes().decode()
    import vl_convert

    made: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", lite)
    bundle = re.sub("</(?=script)", r"<\\/", made, flags=re.IGNORECASE)
    with suppress(OSError, ValueError):
        folder = cache_folder() / "pages"
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / name, bundle.encode())
    return bundle


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _section_html(key: str, title: str, body: str) -> str:
    head = f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{_safe(title)}</h2>'
    return f"{head}\n{body}\n</section>"


def table_html(columns: Sequence[Column], lines: Sequence[Sequence[Entry]], caption: str) -> str:
    if not lines:
        return "<p>Nothing to show.</p>"
    head = "".join(
        f'<th scope="col" aria-sort="none" data-number="{"yes" if column.number else "no"}"'
        f' data-first="{"descending" if column.down else "ascending"}"{"" if column.number else " class=text"}>'
        f'<button type="button"><span>{_safe(column.title)}</span>'
        f"{'<small>' + _safe(column.note) + '</small>' if column.note else ''}</button></th>"
        for column in columns
    )
    body = "\n".join("<tr>" + "".join(map(_entry_html, columns, line, range(len(line)))) + "</tr>" for line in lines)
    top = f"<caption>{_safe(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table class="sorts">{top}\n<tbody>\n{body}\n</tbody></table></div>'


def _entry_html(column: Column, entry: Entry, place: int) -> str:
    known = entry.sort is not None and not (column.number and entry.sort != entry.sort)
    sort = f' data-sort="{_safe("Infinity" if entry.sort == math.inf else entry.sort)}"' if known else ""
    note = f"<small>{_safe(', '.join(entry.notes))}</small>" if entry.notes else ""
    text = f'<span class="bad">{_safe(entry.text)}</span>' if entry.bad else _safe(entry.text)
    if place == 0:
        return f'<th scope="row"{sort}>{text}{note}</th>'
    return f"<td{'' if column.number else ' class=text'}{sort}>{text}{note}</td>"


def failures_html(results: Results, who: str = "Mechanism") -> str:
    failures = failures_of(results)
    if not failures:
        return "<p>No cell failed.</p>"
    columns = [Column(who, number=False), Column("Cell", number=False), Column("Error", number=False)]
    lines = [
        [Entry(str(text), str(text)) for text in (failure["mechanism"], where(failure), failure["error"])]
        for failure in failures
    ]
    return table_html(columns, lines, f"{len(failures)} of {len(cells_of(results))} cells have no figure.")


def charts_html(drawn: Sequence[Any]) -> str:
    if not drawn:
        return "<p>No figures to draw.</p>"
    figures = "\n".join(
        f"<figure{' class=wide' if plot.wide else ''}><figcaption><h3>{_safe(plot.title)}</h3>"
        f"<p>{_safe(plot.text)}</p></figcaption>"
        f'<div class="chart" data-chart="{_safe(plot.name)}"></div></figure>'
        for plot in drawn
    )
    hint = "Point at a mark for its figures; click a name in a legend to see it alone."
    return f'<p class="faint">{hint}</p><div class="charts">{figures}</div>'


def cells_html(results: Results, who: str = "mechanism") -> str:
    """A table per kind of cell, closed until asked for; a failed cell keeps its row and shows its error."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells_of(results):
        groups.setdefault(str(cell["kind"]), []).append(cell)
    made = [
        f"<details><summary>{_safe(kind)}: {len(cells)} cells</summary>{_kind_html(kind, cells, who)}</details>"
        for kind, cells in groups.items()
    ]
    return "\n".join(made) or "<p>Nothing to show.</p>"


def _kind_html(kind: str, cells: Sequence[Cell], who: str) -> str:
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    keys = [key for key in keys if key not in ("kind", "mechanism", "error", "curve", "beyond")]
    keys += ["error"] * any(cell.get("error") for cell in cells)
    numeric = {key: all(number(cell.get(key)) is not None or cell.get(key) is None for cell in cells) for key in keys}
    columns = [Column(who, number=False), *(Column(key.replace("_", " "), number=numeric[key]) for key in keys)]
    lines = [
        [Entry(str(cell["mechanism"]), str(cell["mechanism"])), *(_raw(cell, key) for key in keys)] for cell in cells
    ]
    return table_html(columns, lines, f"{kind} cells, as they were stored")


def _raw(cell: Cell, key: str) -> Entry:
    value = cell.get(key)
    if value is None:
        return Entry("–")
    bad = key in ("status", "error") and not done(cell)
    if isinstance(value, float):
        return Entry(f"{value:.6g}", value, bad=bad)
    return Entry(str(value), value if number(value) is not None else str(value), bad=bad)


def settings_html(settings: Mapping[str, Any]) -> str:
    flat = list(_flatten(settings))
    if not flat:
        return "<p>Not recorded.</p>"
    body = "\n".join(f'<tr><th scope="row">{_safe(k)}</th><td class="text">{_safe(v)}</td></tr>' for k, v in flat)
    return f'<div class="scroll" tabindex="0"><table><tbody>\n{body}\n</tbody></table></div>'


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names for nested settings; a list of plain values stays in one line."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            yield from _flatten(item, f"{prefix}[{place}]")
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(str, value))
    elif not isinstance(value, Mapping):
        yield prefix, value
