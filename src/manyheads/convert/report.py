"""A conversion for people: conversion.html, one page that asks nothing of any other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyheads.convert.table import damage_table
from manyheads.runs.charts import Plot, theme
from manyheads.runs.page import charts_html, settings_html, table_html, write_page
from manyheads.runs.results import number

REPORT = "conversion.html"
# What a line is of, by its `stage`.
ORIGINAL, AFTER, TAUGHT, HEALED, CONTROL = STAGES = ("original", "right after", "taught", "healed", "control")
NOTES = (
    "Bits per token, KL and the share of places where both find the same token likeliest are of held-out text, which "
    "neither calibration nor healing saw. Same greedy text: the model left to itself after half a window, up to the "
    "first token that the original would not have written.",
    "Hidden keys and needles are digits told somewhere in a haystack and asked for at its end: a pass key, and a "
    "number under one of many names. One is right if all its digits are the likeliest ones. Bits alone hide what "
    "broke: a model may lose a few tenths of a bit and every key.",
    "Healed: trained on after the conversion. The control is the original trained alike: compare with that line, since "
    "text that the original never saw makes it better too. Where a student is taught, the control is the same student "
    "trained on the text alone, for as many tokens.",
    "Times are medians of three turns, the model's and the original's in turn, batch 1, through the model's own cache; "
    "on a shared machine trust the ratios. Cache bytes are of the tensors held.",
)


def write_report(record: Mapping[str, Any], path: Path) -> Path:
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    drawn = plots(record)
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": max(map(len, STAGES)),
    }
    sections = [
        ("answer", "Answer", _answer_html(record)),
        ("damage", "What it costs", table_html(*damage_table(rows), "One row per model. Press a title to sort.")),
        ("charts", f"Damage over {record['knob']}", charts_html(drawn)),
        ("figures", "How it is measured", "".join(f"<p>{note}</p>" for note in NOTES)),
        ("source", "Source", settings_html(record["source"])),
        ("environment", "Environment", settings_html(record["environment"])),
        ("settings", "Every setting", settings_html(record["settings"])),
    ]
    results = {"manyheads": record["environment"].get("manyheads", ""), "created": record["created"]}
    return write_page(path, "convert", f"{record['source']['name']}: {record['title']}", results, sections, drawing)


def headline(record: Mapping[str, Any]) -> list[str]:
    """A sentence for every value of the knob: its last line against the original's and the control's."""
    rows = record["rows"]
    first = rows[0]
    last = {row["value"]: row for row in rows if row["value"] is not None}
    said = []
    for row in last.values():
        lost = row["bits_per_token"] - first["bits_per_token"]
        share = row["cache_bytes"] / first["cache_bytes"]
        said.append(
            f"{row['title']}: {first['bits_per_token']:.3f} to {row['bits_per_token']:.3f} bits per token "
            f"({lost:+.3f}), {row['passkeys']} of {row['keys']} hidden keys (the original {first['passkeys']}), "
            f"{share:.0%} of the cache, {row['parameters'] / first['parameters']:.0%} of the parameters, "
            f"{row['decode_ratio']:.2f} of the time per token."
        )
    said += [
        f"{row['title']}: {row['bits_per_token']:.3f} bits per token, {row['passkeys']} of {row['keys']} hidden keys."
        for row in rows
        if row["stage"] == CONTROL
    ]
    return said


def _answer_html(record: Mapping[str, Any]) -> str:
    from html import escape

    items = "".join(f"<li>{escape(line)}</li>" for line in headline(record))
    machine = ", ".join(str(record["environment"].get(key, "")) for key in ("cpu", "device"))
    return f'<div class="answer"><p>On this machine ({escape(machine)}):</p><ul>{items}</ul></div>'


# -- charts ------------------------------------------------------------------------------------------------------------


FIGURES = (
    ("bits_per_token", "Bits per token", False),
    ("kl_bits", "KL to the original, bits", False),
    ("passkeys", "Hidden keys told", True),
    ("greedy_agreement", "Same greedy text", True),
)


def plots(record: Mapping[str, Any]) -> list[Plot]:
    """What is lost over the knob."""
    knob = str(record["knob"]).removeprefix("--").replace("-", " ")
    return [_curve(record["rows"], knob, *figure) for figure in FIGURES]


def _curve(rows: Sequence[Mapping[str, Any]], knob: str, key: str, title: str, share: bool) -> Plot:
    """A line per stage through the values; the original and the control are lines across. share: up to 1, and more is
    better; else less is better, and the axis is turned."""
    import altair as alt

    found = [
        {"stage": row["stage"], "what": row["title"], "value": row["value"], "figure": _figure(row, key)}
        for row in rows
    ]
    points = [each for each in found if each["value"] is not None]
    level = [each for each in found if each["value"] is None]
    present = {each["stage"] for each in found}
    scale = alt.Scale(domain=[stage for stage in STAGES if stage in present])
    limits: dict[str, Any] = {"domain": [0, 1]} if share else {"zero": False, "reverse": True}
    axis = alt.Axis(format="%" if share else "~g", tickCount=6)
    up = alt.Y("figure:Q", scale=alt.Scale(**limits), axis=axis, title=title)
    tips = [
        alt.Tooltip("what:N", title="model"),
        alt.Tooltip("figure:Q", title=title, format=".1%" if share else ".4~f"),
    ]
    pick = alt.selection_point(name="pick", fields=["stage"], bind="legend")
    values = sorted({each["value"] for each in points})
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X(
            "value:Q",
            scale=alt.Scale(zero=False, padding=24),
            axis=alt.Axis(values=values, format="d"),
            title=knob,
        ),
        y=up,
        color=alt.Color("stage:N", scale=scale),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.12)),
    )
    marks = base.mark_point(size=90).encode(shape=alt.Shape("stage:N", scale=scale), tooltip=tips)
    rule = alt.Chart(alt.Data(values=level)).mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
    rule = rule.encode(y=up, color=alt.Color("stage:N", scale=scale), tooltip=tips)
    text = "Up is better" + (". " if share else "; the axis is turned, since less is better. ")
    text += "Dashed: the original" + (" and the control. " if CONTROL in present else ". ") + "Measured."
    return Plot(
        key.replace("_", "-"), f"{title} over {knob}", text, alt.layer(rule, base.mark_line(), marks.add_params(pick))
    )


def _figure(row: Mapping[str, Any], key: str) -> float | None:
    """None where a broken model gave no number: the mark is left out, and the table says so."""
    return number(row[key] / row["keys"] if key == "passkeys" else row[key])
