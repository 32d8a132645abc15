"""A study's charts: one line or point per condition and seed, in the colours and shapes of every other page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manyheads.explain.studies.study import Cell
from manyheads.runs.charts import Plot


def curve_rows(cells: Sequence[Cell], key: str, x: str = "step") -> list[dict[str, Any]]:
    """A row per recorded step: condition, seed, x and the figure `key`, where the curve has it."""
    return [
        {"condition": cell["mechanism"], "seed": cell["seed"], x: row[x], key: round(float(row[key]), 6)}
        for cell in cells
        for row in cell.get("curve", ())
        if key in row
    ]


def chart(
    rows: Sequence[dict[str, Any]], x: str, y: str, *, across: str, up: str, by: str = "condition", log: str = "",
    points: bool = True,
) -> Any:  # fmt: skip
    """Lines per `by` and seed. log: which axes are logarithmic, such as "xy"."""
    import altair as alt

    order = list(dict.fromkeys(row[by] for row in rows))
    scale = alt.Scale(domain=order)
    pick = alt.selection_point(name="pick", fields=[by], bind="legend")
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X(f"{x}:Q", title=across, axis=_axis(rows, x, "x" in log), scale=_scale("x" in log)),
        y=alt.Y(f"{y}:Q", title=up, scale=_scale("y" in log)),
        color=alt.Color(f"{by}:N", scale=scale),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
        detail="seed:N",
    )
    tips = [f"{by}:N", "seed:N", alt.Tooltip(f"{x}:Q", title=across), alt.Tooltip(f"{y}:Q", title=up, format=".4~g")]
    marks = base.mark_point(size=60 if points else 24).encode(
        shape=alt.Shape(f"{by}:N", scale=scale), tooltip=tips
    )  # fmt: skip
    return base.mark_line(strokeWidth=1.5) + marks.add_params(pick)


def _scale(logarithmic: bool) -> Any:
    import altair as alt

    return (
        alt.Scale(type="log", nice=False, padding=10) if logarithmic else alt.Scale(zero=False, nice=False, padding=6)
    )


def _axis(rows: Sequence[dict[str, Any]], x: str, logarithmic: bool) -> Any:
    """Marks at the measured values of a logarithmic axis, of which there are few."""
    import altair as alt

    return alt.Axis(grid=False, values=sorted({row[x] for row in rows}) if logarithmic else alt.Undefined)


def curve_plot(
    cells: Sequence[Cell], key: str, title: str, text: str, up: str, *, log: str = "", wide: bool = False
) -> list[Plot]:
    """A plot of one figure over the steps of training, or nothing where no curve has it."""
    rows = curve_rows(cells, key)
    if "y" in log:
        rows = [row for row in rows if row[key] > 0]
    if not rows:
        return []
    drawn = chart(rows, "step", key, across="step", up=up, log=log, points=False)
    return [Plot(key.replace("_", "-"), title, text, drawn, wide=wide)]


def strip_plot(cells: Sequence[Cell], key: str, title: str, text: str, up: str) -> list[Plot]:
    """A mark per condition and seed, conditions one below the other, or nothing where no cell has the figure."""
    import altair as alt

    rows = [{"condition": cell["mechanism"], "seed": cell["seed"], key: round(float(cell[key]), 6)}
            for cell in cells if key in cell]  # fmt: skip
    if not rows:
        return []
    order = list(dict.fromkeys(row["condition"] for row in rows))
    scale = alt.Scale(domain=order)
    drawn = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(size=70)
        .encode(
            x=alt.X(f"{key}:Q", title=up, scale=alt.Scale(zero=False, padding=10)),
            y=alt.Y("condition:N", title=None, sort=order, axis=alt.Axis(labelLimit=260)),
            color=alt.Color("condition:N", scale=scale, legend=None),
            shape=alt.Shape("condition:N", scale=scale, legend=None),
            tooltip=["condition:N", "seed:N", alt.Tooltip(f"{key}:Q", title=up, format=".4~g")],
        )
    )
    return [Plot(key.replace("_", "-"), title, text, drawn, wide=len(order) > 6)]
