"""A shrink run for people and programs: report.html, one page that asks nothing of any other file, and report.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from manyheads.runs.charts import BYTES, Plot, theme
from manyheads.runs.page import cells_html, charts_html, failures_html, settings_html, table_html, write_page
from manyheads.runs.results import Results, cells_of, done, write_json
from manyheads.shrink.plan import DENSE
from manyheads.shrink.summary import ANSWERED, Row, depth_table, headline, summarise, summary_table

NOTES = (
    "Every figure is of the path that generation takes: a prompt fills the cache in one pass, the policy drops what it "
    "drops, and what follows is given or generated token by token. Policies act while decoding too, where they do.",
    "Answers: keys told among text. With ask = after, the question comes after the prompt, so that a policy chooses "
    "what to keep without knowing what it will be asked; with ask = within, the question is part of the prompt. An "
    "answer is right if every token of it is the likeliest one, which is when greedy decoding gives it.",
    "Text: bits per token of what follows a prompt, token by token. KL and agreement compare with the dense cache's "
    "expectations in the same places; the greedy text is that of the model left to itself.",
    "Dense is transformers' DynamicCache under the model's own attention: it drops nothing, so that what follows a "
    "prompt may come some tokens at once, with the same expectations. Bytes are those of the tensors held, room "
    "for coming tokens included. Times are medians, the dense cache's and the policy's by turns, batch 1; on a shared "
    "machine trust the ratios.",
    "Peak memory is measured in the running process, above the start of a run, and holds the prompt's activations "
    "too: with short prompts they are most of it.",
)


def write_outputs(results: Results, folder: Path) -> None:
    write_json({**results, "summary": summarise(results)}, folder / "report.json")
    write_report(results, folder / "report.html")


def write_report(results: Results, path: Path) -> Path:
    drawn = plots(results)
    titles = [str(own["title"]) for own in results.get("variants", ())]
    names = [DENSE, *(str(own["policy"]) for own in results.get("variants", ()))]
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": max(map(len, names)),
    }
    model = results.get("model", {})
    sections = [
        ("answer", "Answer", _answer_html(results)),
        ("summary", "Summary", table_html(*summary_table(results), "One row per cache. Press a title to sort.")),
        ("failures", "Failures", failures_html(results, "Policy")),
        ("charts", "Quality against bytes", charts_html(drawn)),
        ("depth", "By length and depth", table_html(*depth_table(results), "Share of answers right.")),
        ("cells", "Every cell", cells_html(results, "policy")),
        ("figures", "How it is measured", "".join(f"<p>{note}</p>" for note in NOTES)),
        ("model", "Model", settings_html(model)),
        ("environment", "Environment", settings_html(results.get("environment", {}))),
        ("settings", "Every setting", settings_html(results.get("experiment", {}))),
    ]  # fmt: skip
    what = titles[0] if len(titles) == 1 else f"{len(titles)} caches"
    return write_page(
        path, "shrink", f"{model.get('name', 'a model')}: {what} against the dense one", results, sections, drawing
    )


def _answer_html(results: Results) -> str:
    from html import escape

    items = "".join(f"<li>{escape(line)}</li>" for line in headline(results))
    machine = ", ".join(str(results.get("environment", {}).get(key, "")) for key in ("cpu", "device"))
    return f'<div class="answer"><p>On this machine ({escape(machine)}):</p><ul>{items}</ul></div>'


# -- charts ------------------------------------------------------------------------------------------------------------


def plots(results: Results) -> list[Plot]:
    """Quality against bytes for every task that has figures, and answers by depth."""
    rows = summarise(results)
    made = [_answer_plot(rows, task) for task in ANSWERED]
    made += [
        _curve(rows, "bits", "Bits per token against bytes", "bits_per_token", "perplexity_bytes",
               "bits per token", turned=True),
        _curve(rows, "kl", "Distance from the dense cache's next token against bytes", "kl_bits", "perplexity_bytes",
               "KL, bits", turned=True),
        _curve(rows, "greedy", "Same greedy text against bytes", "greedy_agreement", "perplexity_bytes",
               "share of tokens before the first other one", percent=True),
    ]  # fmt: skip
    return [plot for plot in [*made, *_depth_plots(results)] if plot is not None]


def _answer_plot(rows: Sequence[Row], task: str) -> Plot | None:
    title = f"{ANSWERED[task]} answers against bytes"
    return _curve(rows, task, title, task, f"{task}_bytes", "share of answers right", percent=True)


def _curve(
    rows: Sequence[Row],
    name: str,
    title: str,
    y: str,
    x: str,
    axis: str,
    *,
    percent: bool = False,
    turned: bool = False,
) -> Plot | None:
    """A line per policy through its budgets; the dense cache is a line across and a point of its own."""
    import altair as alt

    order = list(dict.fromkeys(row["policy"] for row in rows))
    points = [
        {"policy": row["policy"], "what": row["title"], "bytes": row[x], "value": row[y]}
        for row in rows
        if row[y] is not None and row[x]
    ]
    if len({point["what"] for point in points}) < 2 or all(point["policy"] == DENSE for point in points):
        return None
    held = sorted({point["bytes"] for point in points})
    present = [policy for policy in order if any(point["policy"] == policy for point in points)]
    scale, legend = alt.Scale(domain=order), alt.Legend(values=present)
    pick = alt.selection_point(name="pick", fields=["policy"], bind="legend")
    limits: dict[str, Any] = {"domain": [0, 1]} if percent else {"zero": False, "reverse": turned}
    across = alt.X(
        "bytes:Q",
        scale=alt.Scale(type="log", base=2, padding=24),
        axis=alt.Axis(values=_doublings(held), labelExpr=BYTES),
        title="cache bytes of a sequence",
    )
    up = alt.Y(
        "value:Q", scale=alt.Scale(**limits), axis=alt.Axis(format="%" if percent else "~g", tickCount=6), title=axis
    )
    tips = [
        alt.Tooltip("what:N", title="policy"),
        alt.Tooltip("value:Q", title=axis, format=".1%" if percent else ".4~f"),
        alt.Tooltip("bytes:Q", format=",.0f"),
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=across,
        y=up,
        color=alt.Color("policy:N", scale=scale, legend=legend),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.12)),
    )
    marks = base.mark_point(size=90).encode(shape=alt.Shape("policy:N", scale=scale, legend=legend), tooltip=tips)
    layers = [base.mark_line(), marks.add_params(pick)]
    dense = [point for point in points if point["policy"] == DENSE]
    if dense:
        rule = alt.Chart(alt.Data(values=dense)).mark_rule(strokeDash=[5, 4], strokeWidth=1.5).encode(y=up)
        layers.insert(0, rule)
    text = "Up and left is better" + ("; the axis is turned, since less is better. " if turned else ". ")
    text += "The dashed line is the dense cache. " if dense else "The dense cache is what this is measured against. "
    text += "Measured; bytes are those of the tensors held, the mean over lengths."
    return Plot(name, title, text, alt.layer(*layers))


def _doublings(values: Sequence[float]) -> list[float]:
    """Powers of two around and between, at most some eight."""
    import math

    first, last = math.floor(math.log2(values[0])), math.ceil(math.log2(values[-1]))
    every = max(1, math.ceil((last - first) / 8))
    return [2.0**k for k in range(first, last + 1, every)]


def _depth_plots(results: Results) -> Iterable[Plot]:
    import altair as alt

    titles = [DENSE, *(own["title"] for own in results.get("variants", ()))]
    for task, title in ANSWERED.items():
        cells = [cell for cell in cells_of(results) if done(cell) and cell["task"] == task and cell.get("by_depth")]
        values = [
            {"policy": cell["mechanism"], "n": cell["n"], "depth": depth, "share": share,
             "place": f"{cell['n']} · {depth:.0%}"}
            for cell in cells
            for depth, share in cell["by_depth"]
        ]  # fmt: skip
        if not values:
            continue
        places = [value["place"] for value in sorted(values, key=lambda value: (value["n"], value["depth"]))]
        base = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("place:N", sort=list(dict.fromkeys(places)), title="length · depth of the key",
                    axis=alt.Axis(labelAngle=-90)),
            y=alt.Y("policy:N", sort=titles, title=None, axis=alt.Axis(labelLimit=240)),
        )  # fmt: skip
        colour = alt.Color(
            "share:Q",
            scale=alt.Scale(domain=[0, 1], scheme="viridis"),
            legend=alt.Legend(format="%", title="answers right", gradientLength=200),
        )
        tips = ["policy:N", alt.Tooltip("n:Q", title="length"), alt.Tooltip("depth:Q", format="%"),
                alt.Tooltip("share:Q", format="%")]  # fmt: skip
        text = "One square for every length and depth; the key stands at that share of the text. Measured."
        rows = len(dict.fromkeys(value["policy"] for value in values))
        squares = base.mark_rect().encode(color=colour, tooltip=tips)
        height = max(120, 22 * rows)
        yield Plot(f"depth-{task}", f"{title} answers by length and depth", text, squares, height=height)
