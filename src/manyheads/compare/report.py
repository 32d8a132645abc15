"""A comparison for people: one offline HTML page.

Names, errors and settings come from outside: everything written into the page goes through `html.escape`, and what
goes into a script is JSON without a `<`.
"""

from __future__ import annotations

from pathlib import Path

from manyheads.compare.growth import WIDEST
from manyheads.compare.summary import missing_sections
from manyheads.compare.tables import headline, summary_table
from manyheads.runs.page import _safe, cells_html, charts_html, failures_html, settings_html, table_html, write_page
from manyheads.runs.results import Results, mechanisms_of

NOTES = (
    "Measured on this machine: quality, forward and backward time (medians), peak memory (above the start of a fresh "
    "process) and decode time. Times on a shared machine wander: trust ratios within one run before absolute numbers.",
    "Counted, not timed: parameters, FLOPs, and state bytes (the bytes of the tensors that a decoding state holds).",
    "Derived from measurements: the growth p of y ~ n^p is a least-squares fit on logarithms over the upper half of "
    "the lengths, or three of them, with a 95% interval from the scatter of turns and lengths; where that is wider "
    f"than {WIDEST} or the fit falls, it says too noisy. The crossover is interpolated on logarithms between measured "
    "lengths, against softmax "
    "(scaled_dot_product_attention) called in the same way.",
    "Quality is the mean over seeds at the learning rate that was selected, with the sample standard deviation. What "
    "differs by less than two standard errors of the test set (binomial for an accuracy), or than seeds do, is a tie; "
    "so is what was timed in several turns whose times overlap.",
)


def write_report(results: Results, path: str | Path) -> Path:
    """The whole comparison as one HTML file that asks nothing of any other."""
    from manyheads.compare.charts import plots
    from manyheads.runs.charts import theme

    drawn = plots(results)
    names = mechanisms_of(results)
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": max(map(len, names), default=1),
    }
    learning = [plot for plot in drawn if plot.name.startswith("learning-")]
    sections = [
        ("answer", "Answer", _answer_html(results)),
        ("summary", "Summary", table_html(*summary_table(results), "One row per mechanism. Press a title to sort.")),
        ("failures", "Failures", failures_html(results)),
        ("charts", "Charts", charts_html([plot for plot in drawn if plot not in learning])),
        ("learning", "Learning curves", charts_html(learning)),
        ("cells", "Every cell", cells_html(results)),
        ("figures", "What is measured, what is counted", "".join(f"<p>{_safe(note)}</p>" for note in NOTES)),
        ("environment", "Environment", settings_html(results.get("environment", {}))),
        ("settings", "Every setting", settings_html(results.get("experiment", {}))),
    ]
    title = f"{len(names)} mechanism{'s' * (len(names) != 1)} compared"
    return write_page(path, "compare", title, results, sections, drawing)


def _answer_html(results: Results) -> str:
    environment = results.get("environment", {})
    known = [str(environment[key]) for key in ("cpu", "device") if environment.get(key)]
    machine = f"On this machine ({', '.join(known)})" if known else "On this machine"
    items = "".join(f"<li>{_safe(line)}</li>" for line in headline(results))
    left_out = "".join(f'<p class="faint">{_safe(line)}</p>' for line in missing_sections(results))
    said = f"<p>{_safe(machine)}, for these tasks and settings:</p><ul>{items}</ul>"
    if not items:
        said = "<p>No sentence follows from what was measured: the tables and charts have all of it.</p>"
    return f'<div class="answer">{said}</div>{left_out}'
