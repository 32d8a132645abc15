"""What charts of any run share: colours, theme, axes, and PNG files.

Colours are those of Okabe and Ito, darkened or lightened until each stands out 3:1 from its background; every
line has a shape as well. Colour and shape come from the theme, so one chart serves light and dark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PALETTES = {
    "light": ["#0072B2", "#D55E00", "#008F68", "#B8579A", "#B87700", "#2E8FCB", "#767676"],
    "dark": ["#3D9BE0", "#F0793A", "#1FB58A", "#DE8FBF", "#E69F00", "#7CC8F2", "#B5B5B5"],
}


INKS = {
    "light": {"background": "#ffffff", "ink": "#1b2027", "faint": "#59636e", "grid": "#dfe3e8"},
    "dark": {"background": "#14181d", "ink": "#e8ebee", "faint": "#9aa5b1", "grid": "#2f363e"},
}


# Seven colours and eight shapes: 56 mechanisms before a pair of them repeats.
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]


BYTES = (
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '.3~g') + ' GiB' : "
    "datum.value >= 1048576 ? format(datum.value / 1048576, '.3~g') + ' MiB' : "
    "datum.value >= 1024 ? format(datum.value / 1024, '.3~g') + ' KiB' : format(datum.value, '.3~g') + ' B'"
)


LENGTH = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : format(datum.value, 'd')"


@dataclass(frozen=True)
class Plot:
    """name: a file's stem. text: how to read it, and whether it is measured. wide: takes a row of the page. height: of
    the chart in pixels."""

    name: str
    title: str
    text: str
    chart: Any
    wide: bool = False
    height: int = 300

    def spec(self, width: int | str) -> dict[str, Any]:
        """Vega-Lite JSON without a theme and without a `$schema` address."""
        # Whether altair's schema takes the charts is asked in tests: it takes most of the time of a page.
        found: dict[str, Any] = self.chart.properties(width=width, height=self.height).to_dict(validate=False)
        return {key: value for key, value in found.items() if key not in ("$schema", "config")}


def theme(scheme: str, columns: int = 4) -> dict[str, Any]:
    """The Vega-Lite config of one colour scheme."""
    inks = INKS[scheme]
    text = {"labelColor": inks["ink"], "titleColor": inks["ink"], "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": inks["background"],
        "font": "system-ui, sans-serif",
        "range": {"category": PALETTES[scheme], "symbol": SHAPES},
        "view": {"stroke": None},
        "axis": text | {"gridColor": inks["grid"], "domainColor": inks["faint"], "tickColor": inks["faint"]}
        | {"titleFontWeight": "normal", "labelOverlap": True},
        "legend": text | {"orient": "bottom", "columns": columns, "symbolLimit": 0, "labelLimit": 400, "title": None},
        "line": {"strokeWidth": 2},
        "point": {"filled": True, "size": 70},
        "text": {"color": inks["ink"], "fontSize": 12},
        "rule": {"color": inks["faint"]},
        "style": {"halo": {"stroke": inks["background"], "strokeWidth": 4, "strokeJoin": "round"}},
    }  # fmt: skip


def vega_lite_version() -> str:
    """The version of Vega-Lite whose specifications altair writes, as vl-convert names it."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def log_ticks(low: float, high: float, base: int) -> list[float]:
    """Some eight marks within [low, high]: powers of the base, with 1, 2, 5 between tens where there is room."""
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    if base == 10 and last - first <= 2:
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    else:
        every = max(1, math.ceil((last - first) / 8))
        ticks = [float(base) ** k for k in range(first, last + 1, every)]
    within = [tick for tick in ticks if low <= tick <= high]
    return within if len(within) > 1 else sorted({low, high})
