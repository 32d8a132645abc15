"""How mechanisms look in the charts of a comparison: colour, shape, lines with points."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def mechanism_marks(present: Iterable[Mapping[str, Any]], order: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """Colour, shape and opacity of a mechanism, and the choice made by clicking in the legend."""
    import altair as alt

    seen = {row["mechanism"] for row in present}
    legend = alt.Legend(values=[name for name in order if name in seen])
    scale = alt.Scale(domain=list(order))
    pick = alt.selection_point(name="pick", fields=["mechanism"], bind="legend")
    encoding = {
        "color": alt.Color("mechanism:N", scale=scale, legend=legend),
        "shape": alt.Shape("mechanism:N", scale=scale, legend=legend),
        "opacity": alt.condition(pick, alt.value(1), alt.value(0.1)),
    }
    return encoding, pick


def lines_of(
    rows: Sequence[dict[str, Any]], order: Sequence[str], x: Any, y: Any, tips: Sequence[Any], **more: Any
) -> Any:
    """Lines with points; where causal and noncausal calls were both measured, the latter are dashed."""
    import altair as alt

    encoding, pick = mechanism_marks(rows, order)
    shape = encoding.pop("shape")
    if len({row.get("causal") for row in rows}) > 1:
        encoding["strokeDash"] = alt.StrokeDash("causal:N", sort=[True, False], legend=alt.Legend(title="causal"))
    base = alt.Chart(alt.Data(values=list(rows))).encode(x=x, y=y, **encoding, **more)
    points = base.mark_point().encode(shape=shape, tooltip=["mechanism:N", *tips]).add_params(pick)
    return base.mark_line() + points


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "task"
