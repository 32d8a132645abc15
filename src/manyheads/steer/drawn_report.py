"""An intervention on a model that draws, for people: the page with both drawings, and tables for a terminal."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from manyheads.runs.charts import Plot, theme
from manyheads.runs.page import charts_html, settings_html, table_html, write_page
from manyheads.runs.results import number
from manyheads.runs.tables import Column, Entry
from manyheads.steer.report import Table, percent

SIDES = ("without", "with")
NOTES = (
    "Both sides begin with the same noise and draw the same captions together; what the intervention draws beside the "
    "caption is there without it too.",
    "A word's map is the cross attention to it at every patch, on average over steps, layers and heads, of the row of "
    "the caption; moved is the share of the map, or of a patch's attention, that went elsewhere. Edits of weights are "
    "shown as edited; where an intervention attends other keys beside, what is shown is what the layer's own would be.",
    "Known: the mean squared error with which the model itself, without the intervention, undoes noise on the drawing, "
    "told a caption; the smaller, the more the drawing is what the model draws for it. Told none, it says how much the "
    "drawing looks like any of its pictures: that is the damage of a sweep.",
    "Time is of this run, both sides in turns: trust the rows through the model, then the ratio, not milliseconds.",
)


def write_report(record: Mapping[str, Any], path: Path) -> Path:
    drawn = plots(record)
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": 16,
    }
    sections = [
        ("drawings", "The drawings", _drawings_html(record)),
        ("path", "Step by step", _path_html(record)),
        ("words", "Where each word is looked at", _maps_html(record) + table_html(*words_table(record), "By word.")),
        ("attention", "Layer by layer", charts_html([plot for plot in drawn if plot.name == "moved"])),
        ("known", "What the model makes of it", table_html(*known_table(record), "Mean squared error; less is known.")),
        ("cost", "Cost", table_html(*cost_table(record), "Both sides in turns.")),
    ]
    if "sweep" in record:
        body = _sweep_html(record) + charts_html([plot for plot in drawn if plot.name == "sweep"])
        body += table_html(*sweep_table(record), "A row per value.")
        sections.append(("sweep", f"Over {record['sweep']['argument']}", body))
    sections += [
        ("figures", "How it is measured", "".join(f"<p>{note}</p>" for note in NOTES)),
        ("method", "The intervention", settings_html(record["method"] | {"model": record["model"]})),
        ("environment", "Environment", settings_html(record["environment"])),
    ]
    results = {"manyheads": record["environment"].get("manyheads", ""), "created": record["created"]}
    title = f"{record['model']['name']}: {record['method']['title']}"
    return write_page(path, "steer", title, results, sections, drawing)


def headline(record: Mapping[str, Any]) -> list[str]:
    change, known = record["difference"], record["known"]
    if change["rms"] == 0:
        said = ["The drawing stays as it was, to the bit."]
    else:
        said = [
            f"{change['pixels']:.1%} of the pixels change visibly; root mean square of the change: {change['rms']:.3f}."
        ]
    said.append(_known_line(known, "caption", "the caption"))
    said.append(_known_line(known, "none", "no caption"))
    if "wanted" in known["with"]:
        said.append(_known_line(known, "wanted", f"{record['drawing']['wanted']!r}"))
    told = max(record["words"][1:], key=lambda row: row["moved"], default=record["words"][0])
    said.append(f"Of the words, {told['word']!r} is looked at elsewhere most: {told['moved']:.0%} of its map moved.")
    if "cost" not in record:
        return said
    cost, rows = record["cost"], record["cost"]["step_rows"]
    said.append(
        f"A step takes {cost['step_ratio']:.2f} of its time without; {rows['with']:g} rows go through the model in it, "
        f"without it {rows['without']:g}."
    )
    return said


def _known_line(known: Mapping[str, Any], name: str, what: str) -> str:
    before, after = (known[side][name] for side in SIDES)
    return f"Told {what}, the model undoes noise on the drawing with an error of {after:.3f}; without, {before:.3f}."


def text_of(record: Mapping[str, Any]) -> list[str]:
    """Both drawings beside each other in characters, where they are grey and small."""
    before, after = (np.asarray(record["pictures"][side][0]) for side in SIDES)
    if before.shape[0] != 1 or before.shape[2] > 32:
        return []
    lines = [f"{'without':<{2 * before.shape[2]}}   with"]
    for left, right in zip(before[0], after[0], strict=True):
        lines.append("   ".join("".join(_shade(level) * 2 for level in row) for row in (left, right)))
    return lines


def _shade(level: float) -> str:
    return " ░▒▓█"[round((min(max(level, -1), 1) + 1) / 2 * 4)]


def tables(record: Mapping[str, Any]) -> list[Table]:
    made = [words_table(record), moved_table(record), known_table(record), cost_table(record)]
    return made + ([sweep_table(record)] if "sweep" in record else [])


def words_table(record: Mapping[str, Any]) -> Table:
    columns = [Column("word", number=False), Column("share, without"), Column("with"), Column("map moved")]
    lines = [
        [Entry(row["word"], row["word"]), *(percent(row["share"][side]) for side in SIDES), percent(row["moved"])]
        for row in record["words"]
    ]
    return columns, lines


def moved_table(record: Mapping[str, Any]) -> Table:
    kinds = list(record["moved"])
    columns = [Column("layer"), *(Column(f"{kind} attention moved") for kind in kinds)]
    count = max(map(len, record["moved"].values()), default=0)
    lines = []
    for layer in range(count):
        own = [record["moved"][kind][layer : layer + 1] for kind in kinds]
        lines.append([Entry(str(layer), layer), *(percent(found[0]) if found else Entry("", None) for found in own)])
    return columns, lines


def known_table(record: Mapping[str, Any]) -> Table:
    names = {"caption": record["drawing"]["caption"], "wanted": record["drawing"]["wanted"], "none": "no caption"}
    columns = [Column("told", number=False), Column("without"), Column("with")]
    lines = []
    for name in record["known"]["with"]:
        values = [record["known"][side][name] for side in SIDES]
        lines.append([Entry(str(names[name]), name), *(Entry(f"{value:.4f}", value) for value in values)])
    return columns, lines


def cost_table(record: Mapping[str, Any]) -> Table:
    own = record["cost"]
    columns = [Column("of a step", number=False), Column("without"), Column("with"), Column("ratio")]
    lines = []
    for name, title in (("step_rows", "rows through the model"), ("step_ms", "milliseconds")):
        before, after = (own[name][side] for side in SIDES)
        ratio = own["step_ratio"] if name == "step_ms" else after / before
        cells = [Entry(f"{value:.4g}", value) for value in (before, after)]
        lines.append([Entry(title, title), *cells, Entry(f"{ratio:.2f}", ratio)])
    return columns, lines


def sweep_table(record: Mapping[str, Any]) -> Table:
    own = record["sweep"]
    told = any("gained" in point for point in own["points"])
    columns = [Column(own["argument"]), Column("pixels changed"), Column("change", "root mean square")]
    columns += [Column("wanted gains")] if told else []
    columns += [Column("lost", "error told nothing")]
    lines = []
    for point in own["points"]:
        name = f"{point['value']:g}" if isinstance(point["value"], int | float) else str(point["value"])
        line = [Entry(name, point["value"]), percent(point["pixels"]), Entry(f"{point['rms']:.3f}", point["rms"])]
        line += [Entry(f"{point['gained']:+.4f}", point["gained"])] if told else []
        lines.append([*line, Entry(f"{point['lost']:+.4f}", point["lost"])])
    return columns, lines


# -- pictures ----------------------------------------------------------------------------------------------------------


def png(levels: Any) -> bytes:
    """[c, height, width] from -1 to 1."""
    from PIL import Image

    own = ((np.asarray(levels, dtype=np.float64).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    out = BytesIO()
    Image.fromarray(own[0] if len(own) == 1 else own.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def picture_html(levels: Any, label: str, width: int) -> str:
    data = base64.b64encode(png(levels)).decode()
    look = f"width:{width}px;image-rendering:pixelated;display:block;border-radius:3px"
    return f'<img src="data:image/png;base64,{data}" alt="{escape(label)}" title="{escape(label)}" style="{look}">'


def _heat(values: Sequence[float], most: float) -> Any:
    """A map over patches as a picture, black to white up to the word's greatest weight on either side."""
    side = int(len(values) ** 0.5)
    return np.asarray(values).reshape(1, side, -1) / max(most, 1e-12) * 2 - 1


def grid_html(head: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *head))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in lines
    )
    table = f'<table style="width:auto"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _drawings_html(record: Mapping[str, Any]) -> str:
    captions = record["drawing"]["captions"]
    lines = []
    for row, caption in enumerate(captions):
        both = [picture_html(record["pictures"][side][row], f"{caption}, {side}", 200) for side in SIDES]
        lines.append((caption, both))
    items = "".join(f"<li>{escape(line)}</li>" for line in headline(record))
    return f'{grid_html(SIDES, lines)}<div class="answer"><ul>{items}</ul></div>'


def _path_html(record: Mapping[str, Any]) -> str:
    steps = [str(own["step"]) for own in record["path"]["with"]]
    lines = [
        (side, [picture_html(own["picture"], f"before step {own['step']}, {side}", 64) for own in record["path"][side]])
        for side in SIDES
    ]
    return grid_html(steps, lines)


def _maps_html(record: Mapping[str, Any]) -> str:
    lines = []
    for side in SIDES:
        cells = []
        for row in record["words"]:
            most = max(max(row["maps"][each]) for each in SIDES)
            cells.append(picture_html(_heat(row["maps"][side], most), f"{row['word']}, {side}", 96))
        lines.append((side, cells))
    return grid_html([row["word"] for row in record["words"]], lines)


def _sweep_html(record: Mapping[str, Any]) -> str:
    own = record["sweep"]
    names = [f"{point['value']}" for point in own["points"]]
    cells = [picture_html(point["picture"][0], f"{own['argument']}={point['value']}", 96) for point in own["points"]]
    return grid_html(names, [(own["argument"], cells)])


# -- charts ------------------------------------------------------------------------------------------------------------


def plots(record: Mapping[str, Any]) -> list[Plot]:
    return [_moved(record), *([_curve(record)] if "sweep" in record else [])]


def _moved(record: Mapping[str, Any]) -> Plot:
    import altair as alt

    points = [
        {"attention": kind, "layer": layer, "share": value}
        for kind, values in record["moved"].items()
        for layer, value in enumerate(values)
    ]
    tips = [alt.Tooltip("attention:N"), alt.Tooltip("layer:Q"), alt.Tooltip("share:Q", format=".1%")]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("layer:Q", axis=alt.Axis(format="d", tickMinStep=1)),
        y=alt.Y("share:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domainMin=0), title="share that moved"),
        color=alt.Color("attention:N"),
    )
    layers = base.mark_line() + base.mark_point().encode(shape="attention:N", tooltip=tips)
    text = "Share of a patch's attention that goes elsewhere, on average over patches, steps and heads."
    return Plot("moved", "What changed in attention", text, layers)


def _curve(record: Mapping[str, Any]) -> Plot:
    """Effect against damage: far up at little damage is good."""
    import altair as alt

    own = record["sweep"]
    told = any("gained" in point for point in own["points"])
    effect = "what the wanted caption gains on the own" if told else "change, root mean square"
    points = [
        {
            "value": str(point["value"]),
            "effect": number(point["gained"] if told else point["rms"]),
            "damage": number(point["lost"]),
        }
        for point in own["points"]
    ]
    tips = [
        alt.Tooltip("value:N", title=own["argument"]),
        alt.Tooltip("effect:Q", title=effect, format="+.4~f"),
        alt.Tooltip("damage:Q", title="error told nothing", format="+.4~f"),
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("damage:Q", scale=alt.Scale(zero=False, padding=24), title="error told nothing, more than without"),
        y=alt.Y("effect:Q", scale=alt.Scale(zero=False, padding=24), title=effect),
    )
    layers = base.mark_point(size=90).encode(tooltip=tips) + base.mark_text(dy=-12).encode(text="value:N")
    text = f"Each mark is a value of {own['argument']}; up and to the left is better. Measured."
    return Plot("sweep", f"Effect against damage over {own['argument']}", text, layers, wide=True)
