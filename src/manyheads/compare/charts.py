"""The charts of a comparison, drawn with altair from results alone, for the report and as PNG files.

Colours are those of Okabe and Ito, darkened or lightened until each stands out 3:1 from its background; every
mechanism has a shape as well. Colour and shape come from the theme, so one chart serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manyheads.compare.marks import lines_of, mechanism_marks, slug
from manyheads.compare.summary import quality_against_state, series, summarise, tasks_of
from manyheads.compare.sweeps import sweep_plots
from manyheads.runs.charts import BYTES, LENGTH, Plot, log_ticks, theme, vega_lite_version
from manyheads.runs.files import write_atomically
from manyheads.runs.results import Cell, Results, cells_of, done, mechanisms_of, number

POINTS_PER_CHART = 6000  # learning curves beyond this are thinned; learning_curves.csv keeps every point


def plots(results: Results) -> list[Plot]:
    """Every chart for which there are figures."""
    made = [
        *_quality_plots(results),
        *_beyond_plots(results),
        *sweep_plots(results),
        *_cost_plots(results),
        *_decode_plots(results),
        *_learning_plots(results),
    ]
    return [plot for plot in made if plot is not None]


def write_png(results: Results, folder: str | Path) -> list[Path]:
    """One PNG per chart, on a light background; needs no network."""
    import vl_convert

    columns = max(1, 100 // (max(map(len, mechanisms_of(results)), default=1) + 6))
    written = []
    for plot in plots(results):
        spec = {**plot.spec(680), "config": theme("light", columns), "padding": 12}
        spec["title"] = {"text": plot.title, "anchor": "start", "offset": 12}
        image = vl_convert.vegalite_to_png(spec, vl_version=vega_lite_version(), scale=2.0, allowed_base_urls=[])
        written.append(write_atomically(Path(folder) / f"{plot.name}.png", image))
    return written


def _lengths(field: str, rows: Iterable[Mapping[str, Any]], title: str) -> Any:
    import altair as alt

    axis = alt.Axis(values=sorted({row[field] for row in rows}), labelExpr=LENGTH, grid=False)
    return alt.X(f"{field}:Q", scale=alt.Scale(type="log", base=2, nice=False), axis=axis, title=title)


def _log(field: str, rows: Iterable[Mapping[str, Any]], title: str, size: bool = False) -> Any:
    """A logarithmic axis, in bytes or in plain numbers."""
    import altair as alt

    values = [row[field] for row in rows]
    ticks = log_ticks(min(values), max(values), 2 if size else 10)
    axis = alt.Axis(values=ticks, labelExpr=BYTES) if size else alt.Axis(values=ticks, format=",.12~g")
    scale = alt.Scale(type="log", base=2 if size else 10, nice=False, padding=10)
    return alt.Y(f"{field}:Q", scale=scale, axis=axis, title=title)


def _quality_plots(results: Results) -> Iterable[Plot]:
    order = mechanisms_of(results)
    for task in tasks_of(results):
        points, left_out = quality_against_state(results, task)
        if points:
            yield _quality_plot(task, points, left_out, order)


def _quality_plot(task: str, points: list[dict[str, Any]], left_out: Sequence[str], order: Sequence[str]) -> Plot:
    import altair as alt

    higher = points[0]["higher_is_better"]
    metric = str(points[0]["metric"]).replace("_", " ")
    for point in points:
        spread = point["std"] or 0.0
        point |= {"low": point["mean"] - spread, "high": point["mean"] + spread}
        point["on the front"] = "yes" if point["pareto"] else "no"
    least = min(point["state_bytes"] for point in points)
    ticks = alt.Axis(labelExpr=BYTES, tickCount=6)
    scale = alt.Scale(type="log", base=2, padding=48) if least > 0 else alt.Scale(type="symlog", padding=48)
    x = alt.X("state_bytes:Q", scale=scale, axis=ticks, title=f"state bytes at context {points[0]['context']:,}")
    direction = "higher is better" if higher else "lower is better, so the axis is turned"
    vertical = alt.Scale(zero=False, reverse=not higher, padding=16)
    title = f"{metric} ({direction})"
    y = alt.Y("mean:Q", scale=vertical, axis=alt.Axis(tickCount=6), title=title)
    encoding, pick = mechanism_marks(points, order)
    base = alt.Chart(alt.Data(values=points)).encode(x=x)
    front = base.transform_filter("datum.pareto").encode(y=y)
    step = front.mark_line(interpolate="step-after", strokeDash=[5, 4], strokeWidth=1.5, color="#868e96")
    ring = front.mark_point(shape="circle", filled=False, size=330, strokeWidth=1.5, color="#868e96")
    bars = base.mark_rule().encode(y=alt.Y("low:Q", scale=vertical, title=title), y2="high:Q")
    tips = ["mechanism:N", alt.Tooltip("mean:Q", title=metric, format=".4~f"), alt.Tooltip("std:Q", format=".2~g"),
            alt.Tooltip("state_bytes:Q", format=","), "on the front:N"]  # fmt: skip
    marks = base.mark_point(size=110).encode(y=y, tooltip=tips, **encoding).add_params(pick)
    place_labels(points, all_named=len(points) <= 10)
    names = [
        base.transform_filter(f"datum.side == '{side}'")
        .mark_text(align="left" if side == "right" else "right", dx=14 if side == "right" else -14, limit=150, **style)
        .encode(y=alt.Y("label:Q", scale=vertical, title=title), text="mechanism:N")
        for side in sorted({point["side"] for point in points if "side" in point})
        for style in ({"style": "halo"}, {})
    ]
    text = (
        "Up and left is better. Ringed marks on the dashed line are the pareto front: no other mechanism is as good "
        "with as little state. Bars are one standard deviation over seeds. Quality is measured, state counted."
    )
    if left_out:
        text += f" Not placed, for want of a quality or of a state at this context: {', '.join(left_out)}."
    chart = alt.layer(step, bars, ring, *names, marks)
    return Plot(f"quality-{slug(task)}", f"Quality against state: {task}", text, chart, wide=True)


def place_labels(points: Sequence[dict[str, Any]], all_named: bool) -> None:
    """Gives the points that are named a `side` and a height `label`, pushed apart where two names would overlap.

    In shares of the plot: a name is taken to be 0.2 wide and 0.055 high, which is so at 680 by 300 pixels.
    """
    logs = [math.log1p(point["state_bytes"]) for point in points]
    bottom, top = min(point["low"] for point in points), max(point["high"] for point in points)
    width, height = (max(logs) - min(logs)) or 1.0, (top - bottom) or 1.0
    placed: list[tuple[float, float]] = []
    for x, point in sorted(zip(logs, points, strict=True), key=lambda pair: pair[1]["mean"]):
        if not (all_named or point["pareto"]):
            continue
        across, up = (x - min(logs)) / width, (point["mean"] - bottom) / height
        near = [other_up for other_across, other_up in placed if abs(other_across - across) < 0.2]
        up = max([up, *(other + 0.055 for other in near)])
        placed.append((across, up))
        point |= {"label": bottom + up * height, "side": "left" if across > 0.7 else "right"}


def _beyond_plots(results: Results) -> Iterable[Plot]:
    """Quality over the length, from the trained one on, where it was scored beyond."""
    import altair as alt

    summary = summarise(results)
    for task, cells in tasks_of(results).items():
        found = {row["mechanism"]: row["quality"][task] for row in summary if row["quality"][task]["beyond"]}
        if not found:
            continue
        trained, rows = cells[0]["n"], []
        for name, quality in found.items():
            points = [{"n": trained, "mean": quality["mean"], "std": quality["std"]}, *quality["beyond"]]
            rows += [
                {"mechanism": name, **{key: point[key] for key in ("n", "mean", "std")}}
                for point in points
                if point["mean"] is not None
            ]
        if rows:
            first = next(iter(found.values()))
            metric, higher = str(first["metric"]).replace("_", " "), first["higher_is_better"]
            title = f"{metric} ({'higher is better' if higher else 'lower is better, so the axis is turned'})"
            y = alt.Y("mean:Q", scale=alt.Scale(zero=False, reverse=not higher, padding=16), title=title)
            tips = ["n:Q", alt.Tooltip("mean:Q", title=metric, format=".4~f"), alt.Tooltip("std:Q", format=".2~g")]
            chart = lines_of(rows, mechanisms_of(results), _lengths("n", rows, "length n"), y, tips)
            text = f"Measured, mean over seeds. Trained at n {trained:,} alone; a missing point has no score."
            yield Plot(f"beyond-{slug(task)}", f"Quality beyond the trained length: {task}", text, chart, wide=True)


def _over_length(results: Results, kind: str, x: str, y: str, factor: float = 1.0) -> list[dict[str, Any]]:
    cells = [cell for cell in cells_of(results) if cell["kind"] == kind]
    rows = []
    for name in mechanisms_of(results):
        own = [cell for cell in cells if cell["mechanism"] == name]
        for causal in dict.fromkeys(cell.get("causal") for cell in own):
            found = series((cell for cell in own if cell.get("causal") == causal), kind, x, y)
            rows += [{"mechanism": name, "causal": causal, x: n, y: v * factor} for n, v in found.items()]
    return rows


def _cost_plot(results: Results, name: str, title: str, kind: str, y: str, axis: str) -> Plot | None:
    import altair as alt

    size = y in ("peak_bytes", "state_bytes")
    x, across = ("context", "context (tokens)") if kind == "decode" else ("n", "length n")
    found = _over_length(results, kind, x, y, 1.0 if size else 1e3)
    rows = [row for row in found if row[y] > 0]
    if not rows:
        return None
    tips = [alt.Tooltip(f"{x}:Q", format=","), alt.Tooltip(f"{y}:Q", title=axis, format="," if size else ",.4~g")]
    chart = lines_of(rows, mechanisms_of(results), _lengths(x, rows, across), _log(y, rows, axis, size), tips)
    source = "Counted from the tensors held" if y == "state_bytes" else "Measured"
    text = f"{source}; both axes are logarithmic, so a straight line is a power of the length."
    if kind == "memory":
        text += " Peak above the start of a fresh process."
    if len(rows) < len(found):
        text += f" {len(found) - len(rows)} figures are zero and have no place on such an axis; the tables show them."
    return Plot(name, title, text, chart)


def _cost_plots(results: Results) -> Iterable[Plot | None]:
    yield _cost_plot(results, "forward-time", "Forward time over length", "speed", "forward_s", "forward, ms")
    both = "forward and backward"
    yield _cost_plot(results, "training-time", "Forward and backward time over length", "speed", "forward_backward_s",
                     f"{both}, ms")  # fmt: skip
    yield _cost_plot(results, "memory", "Peak memory over length", "memory", "peak_bytes", "peak memory")


def _decode_plots(results: Results) -> Iterable[Plot | None]:
    yield _cost_plot(results, "decode-time", "Decode time over context", "decode", "seconds_per_token", "ms per token")
    yield _cost_plot(results, "decode-state", "State over context", "decode", "state_bytes", "state")


def _learning_plots(results: Results) -> Iterable[Plot | None]:
    for task, cells in tasks_of(results).items():
        chosen = [cell for cell in cells if cell.get("best") and cell.get("curve")]
        metric = next((str(cell["metric"]).replace("_", " ") for cell in chosen if cell.get("metric")), "quality")
        yield _learning_plot(results, task, chosen, "loss", "training loss")
        yield _learning_plot(results, task, chosen, "value", metric)


def _learning_plot(results: Results, task: str, cells: Sequence[Cell], field: str, axis: str) -> Plot | None:
    import altair as alt

    keep = _thinner(cells)
    rows = [
        {"mechanism": cell["mechanism"], "seed": cell.get("seed"), "step": point["step"], field: round(value, 5)}
        for cell in cells
        for point in keep([p for p in cell["curve"] if number(p.get(field)) is not None])
        if (value := number(point[field])) is not None
    ]
    if not rows:
        return None
    encoding, pick = mechanism_marks(rows, mechanisms_of(results))
    shape = encoding.pop("shape")
    x = alt.X("step:Q", title="step", axis=alt.Axis(grid=False))
    y = alt.Y(f"{field}:Q", title=axis, scale=alt.Scale(zero=False))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, detail="seed:N", **encoding)
    tips = ["mechanism:N", "seed:N", "step:Q", alt.Tooltip(f"{field}:Q", title=axis)]
    points = base.mark_point(size=28).encode(shape=shape, tooltip=tips).add_params(pick)
    text = "Measured. One line per seed, at the learning rate that was selected."
    unfinished = sorted({cell["mechanism"] for cell in cells if not done(cell)})
    if unfinished:
        text += f" Runs that failed end where they failed: {', '.join(unfinished)}."
    title = f"Learning curves: {task}, {axis}"
    return Plot(f"learning-{slug(task)}-{field}", title, text, base.mark_line(strokeWidth=1.5) + points)


def _thinner(cells: Sequence[Cell]) -> Callable[[list[Any]], list[Any]]:
    """Keeps the last point of a curve and as many others, evenly spread, as a page can carry."""
    limit = max(20, POINTS_PER_CHART // max(1, len(cells)))

    def keep(curve: list[Any]) -> list[Any]:
        if len(curve) <= limit:
            return curve
        return [curve[round(i * (len(curve) - 1) / (limit - 1))] for i in range(limit)]

    return keep
