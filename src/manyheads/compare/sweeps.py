"""What a sweep over widths, settings and hybrids says: quality over the bytes a model remembers, and over its width."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from manyheads.compare.marks import lines_of, slug
from manyheads.compare.summary import summarise, tasks_of
from manyheads.runs.charts import BYTES, Plot
from manyheads.runs.results import Results

_SIZES = ("hidden_size", "heads")


def bare(label: str) -> str:
    """'based[feature_dim=8],mswa[window=16]' -> 'based,mswa': what all settings of one contestant share."""
    kept, depth = "", 0
    for letter in label:
        depth += letter == "["
        kept += "" if depth else letter
        depth -= letter == "]"
    return kept


def swept(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Under each task, at whatever widths: a point per contestant and width with its quality, the bytes that the whole
    model remembers of an example (None where it does not decode) and the width (None where there is one)."""
    rows, points = summarise(results), dict[str, list[dict[str, Any]]]()
    for label in tasks_of(results):
        task, width = _width_of(label)
        for row in rows:
            found = row["quality"][label]
            if found["mean"] is None:
                continue
            kept = {key: found[key] for key in ("mean", "std", "metric", "higher_is_better", "model_state_bytes")}
            point = {"mechanism": row["mechanism"], "kind": bare(row["mechanism"]), "width": width, **kept}
            points.setdefault(task, []).append(point)
    return points


def _width_of(label: str) -> tuple[str, int | None]:
    """'recall[hidden_size=64,pairs=4], n 64' -> 'recall[pairs=4], n 64' and 64."""
    found = re.search(r"hidden_size=(\d+)", label)
    for size in _SIZES:
        label = re.sub(rf"(?<=[\[,]){size}=\d+,?", "", label)
    return label.replace(",]", "]").replace("[]", ""), int(found[1]) if found else None


def sweep_plots(results: Results) -> Iterable[Plot]:
    for task, points in swept(results).items():
        held = [dict(point) for point in points if point["model_state_bytes"]]
        several = len(held) > len({point["kind"] for point in held}) or any("," in point["kind"] for point in held)
        if len(held) > 1 and several:
            yield _state_plot(task, held, [point["mechanism"] for point in points if not point["model_state_bytes"]])
        if len({point["width"] for point in points}) > 1:
            yield _width_plot(task, points)


def _state_plot(task: str, points: list[dict[str, Any]], left_out: Sequence[str]) -> Plot:
    import altair as alt

    settings = Counter(kind for kind, _ in {(point["kind"], point["mechanism"]) for point in points})
    for point in points:  # where a contestant has several settings a line is of one width, else it runs over widths
        point["line"] = f"{point['kind']} {point['width'] if settings[point['kind']] > 1 else ''}"
        point |= {"setting": point["mechanism"], "mechanism": point["kind"]}
    least, most = (choose(point["model_state_bytes"] for point in points) for choose in (min, max))
    ticks = [2**power for power in range(math.floor(math.log2(least)), math.ceil(math.log2(most)) + 1)]
    scale = alt.Scale(type="log", base=2, nice=False, padding=24)
    axis = alt.Axis(labelExpr=BYTES, values=ticks, labelOverlap=True)
    x = alt.X("model_state_bytes:Q", scale=scale, axis=axis, title="state of the whole model, bytes")
    chart = _curves(points, x, [alt.Tooltip("model_state_bytes:Q", format=",")], detail="line:N")
    text = (
        "Up and left is better. A point is a model: what its layers remember of one example, summed and counted from "
        "the tensors held, and how well it does, measured. A line joins the settings, or the widths, of one contestant."
    )
    if left_out:
        text += f" Without a state, as they do not decode: {', '.join(dict.fromkeys(left_out))}."
    title = f"Quality over the state of the model: {task}"
    return Plot(f"sweep-state-{slug(task)}", title, text, chart, wide=True)


def _width_plot(task: str, points: Sequence[Mapping[str, Any]]) -> Plot:
    import altair as alt

    rows = [{**point, "setting": point["mechanism"]} for point in points]
    axis = alt.Axis(values=sorted({row["width"] for row in rows}), grid=False)
    x = alt.X("width:Q", scale=alt.Scale(type="log", base=2, nice=False, padding=24), axis=axis, title="width")
    text = "Measured, each width a model of its own, trained alike; the width is logarithmic."
    return Plot(f"sweep-width-{slug(task)}", f"Quality over width: {task}", text, _curves(rows, x, []), wide=True)


def _curves(rows: list[dict[str, Any]], x: Any, tips: Sequence[Any], **encoding: Any) -> Any:
    import altair as alt

    first = rows[0]
    metric, higher = str(first["metric"]).replace("_", " "), first["higher_is_better"]
    title = f"{metric} ({'higher is better' if higher else 'lower is better, so the axis is turned'})"
    y = alt.Y("mean:Q", scale=alt.Scale(zero=False, reverse=not higher, padding=16), title=title)
    order = list(dict.fromkeys(row["mechanism"] for row in rows))
    said = ["setting:N", "width:Q", alt.Tooltip("mean:Q", title=metric, format=".4~f"), *tips]
    return lines_of(rows, order, x, y, said, **encoding)
