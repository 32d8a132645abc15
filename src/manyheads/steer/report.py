"""An intervention for people: steer.html, one page that asks nothing of any other file, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from manyheads.runs.charts import Plot, theme
from manyheads.runs.page import charts_html, settings_html, table_html, write_page
from manyheads.runs.results import number
from manyheads.runs.tables import Column, Entry

NOTES = (
    "Both sides read the same prompt. Answers are greedy. KL is in bits, of the model's own distribution from the one "
    "with the intervention, at the next token and on average along the model's own answer.",
    "Attention is that of the prompt's last place, on average over heads; sinks are keys that get five times their "
    "share from all later queries without the intervention. An intervention that edits weights is shown with its "
    "edited weights; one that changes what heads put out shows in the layers behind it.",
    "Time is of this run: both sides in turns, the median of the turns' ratios. Trust the ratio, not the milliseconds.",
    "A sweep measures effect at the prompt's next token and damage in bits per byte of text that the model did not "
    "see in training, read behind the prompt.",
)
Table = tuple[list[Column], list[list[Entry]]]


def write_report(record: Mapping[str, Any], path: Path) -> Path:
    drawn = plots(record)
    drawing = {
        "specs": {plot.name: plot.spec("container") for plot in drawn},
        "themes": {scheme: theme(scheme) for scheme in ("light", "dark")},
        "widest": max((len(name) + 8 for name in record["attention"]), default=8),
    }
    sections = [
        ("answer", "Answer", _answer_html(record)),
        ("next", "Next token", table_html(*next_table(record), "The likeliest next tokens, without and with.")),
        ("attention", "Attention", charts_html([plot for plot in drawn if plot.name.startswith("attention")])),
        ("layers", "Layer by layer", table_html(*attention_table(record), "Share of the last place's attention.")),
        ("cost", "Cost", table_html(*cost_table(record), "Milliseconds, both sides in turns.")),
    ]
    if "sweep" in record:
        curves = charts_html([plot for plot in drawn if plot.name.startswith("sweep")])
        table = table_html(*sweep_table(record), "A row per value.")
        sections.append(("sweep", f"Over {record['sweep']['argument']}", curves + table))
    sections += [
        ("figures", "How it is measured", "".join(f"<p>{note}</p>" for note in NOTES)),
        ("method", "The intervention", settings_html(record["method"] | {"model": record["model"]})),
        ("environment", "Environment", settings_html(record["environment"])),
    ]
    results = {"manyheads": record["environment"].get("manyheads", ""), "created": record["created"]}
    title = f"{record['model']['name']}: {record['method']['title']}"
    return write_page(path, "steer", title, results, sections, drawing)


def headline(record: Mapping[str, Any]) -> list[str]:
    own = record["answers"]
    said = [
        f"The answer {'stays' if own['same'] else 'changes'}; the next token's distribution moves by "
        f"{record['next']['kl_bits']:.3f} bits, along the answer by {record['answer_kl_bits']:.3f}.",
        *(_cost_lines(record["cost"]) if "cost" in record else []),
    ]
    if "wanted" in record:
        wanted = record["wanted"]
        said.append(f"p({wanted['text']!r}) goes from {wanted['without']:.3%} to {wanted['with']:.3%}.")
    for name, shares in record["attention"].items():
        before, after = (sum(shares[side]) / len(shares[side]) for side in ("without", "with"))
        said.append(f"Attention on {TITLES.get(name, name)}: {before:.1%} to {after:.1%} on average over layers.")
    return said


def _cost_lines(cost: Mapping[str, Any]) -> list[str]:
    said = [f"A token takes {cost['token_ratio']:.2f} of its time without, the prompt {cost['prompt_ratio']:.2f}."]
    held = cost["cache_bytes"]
    if held["with"] != held["without"]:
        said.append(f"Keys and values take {held['with'] / held['without']:.2f} of their {held['without']:,} bytes.")
    return said


TITLES = {"text": "the marked words", "image": "the image", "sinks": "sinks"}


def _answer_html(record: Mapping[str, Any]) -> str:
    answers = record["answers"]
    both = "".join(
        f'<tr><th scope="row">{side}</th><td class="text"><pre>{escape(answers[side])}</pre></td></tr>'
        for side in ("without", "with")
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in headline(record))
    table = f'<div class="scroll" tabindex="0"><table><tbody>{both}</tbody></table></div>'
    return f'{table}<div class="answer"><ul>{items}</ul></div>'


def percent(value: float) -> Entry:
    return Entry(f"{value:.1%}", value)


def text_of(record: Mapping[str, Any]) -> list[str]:
    return [f"{side:>7}: {record['answers'][side]!r}" for side in ("without", "with")]


def tables(record: Mapping[str, Any]) -> list[Table]:
    made = [next_table(record), attention_table(record), cost_table(record)]
    return made + ([sweep_table(record)] if "sweep" in record else [])


def next_table(record: Mapping[str, Any]) -> Table:
    columns = [Column("token", number=False), Column("without"), Column("with")]
    rows = record["next"]["tokens"]
    return columns, [
        [Entry(repr(row["token"]), row["token"]), percent(row["without"]), percent(row["with"])] for row in rows
    ]


def attention_table(record: Mapping[str, Any]) -> Table:
    names = list(record["attention"])
    columns = [Column("layer", number=True)]
    for name in names:
        columns += [Column(f"{name}, without", brief=name), Column(f"{name}, with", brief="with")]
    count = len(record["attention"][names[0]]["without"]) if names else 0
    lines = []
    for layer in range(count):
        cells = [percent(record["attention"][name][side][layer]) for name in names for side in ("without", "with")]
        lines.append([Entry(str(layer), layer), *cells])
    return columns, lines


def cost_table(record: Mapping[str, Any]) -> Table:
    columns = [Column("what", number=False), Column("without", "ms"), Column("with", "ms"), Column("ratio")]
    own, lines = record["cost"], []
    for name, title in (("prompt", "the prompt"), ("token", "a token behind it")):
        times = own[f"{name}_ms"]
        cells = [Entry(f"{times[side]:.2f}", times[side]) for side in ("without", "with")]
        lines.append([Entry(title, title), *cells, Entry(f"{own[f'{name}_ratio']:.2f}", own[f"{name}_ratio"])])
    return columns, lines


def sweep_table(record: Mapping[str, Any]) -> Table:
    own = record["sweep"]
    told = any("wanted" in point for point in own["points"])
    columns = [Column(own["argument"]), Column("KL", "bits"), *([Column("p(wanted)")] if told else [])]
    columns += [Column("lost", "bits per byte"), Column("answer", number=False)]
    lines = []
    for point in own["points"]:
        value, answer = point["value"], point["answer"] if point["changed"] else "the same"
        name = f"{value:g}" if isinstance(value, int | float) else str(value)
        line = [Entry(name, value), Entry(f"{point['kl_bits']:.3f}", point["kl_bits"])]
        line += [percent(point["wanted"]["with"])] if told else []
        lines.append([*line, Entry(f"{point['lost']:+.3f}", point["lost"]), Entry(answer, answer)])
    return columns, lines


# -- charts ------------------------------------------------------------------------------------------------------------


def plots(record: Mapping[str, Any]) -> list[Plot]:
    found = [_layers(name, shares) for name, shares in record["attention"].items()]
    return found + ([_curve(record)] if "sweep" in record else [])


def _layers(name: str, shares: Mapping[str, list[float]]) -> Plot:
    import altair as alt

    points = [
        {"side": side, "layer": layer, "share": value}
        for side in ("without", "with")
        for layer, value in enumerate(shares[side])
    ]
    tips = [alt.Tooltip("side:N"), alt.Tooltip("layer:Q"), alt.Tooltip("share:Q", format=".1%")]
    pick = alt.selection_point(name="pick", fields=["side"], bind="legend")
    scale = alt.Scale(domain=["without", "with"])
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("layer:Q", axis=alt.Axis(format="d", tickMinStep=1)),
        y=alt.Y("share:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domainMin=0), title="share of attention"),
        color=alt.Color("side:N", scale=scale),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.12)),
    )
    marks = base.mark_point().encode(shape=alt.Shape("side:N", scale=scale), tooltip=tips).add_params(pick)
    title = f"On {TITLES.get(name, name)}"
    return Plot(f"attention-{name}", title, "Of the prompt's last place, average over heads.", base.mark_line() + marks)


def _curve(record: Mapping[str, Any]) -> Plot:
    """Effect against damage: far up at little damage is good."""
    import altair as alt

    own = record["sweep"]
    told = any("wanted" in point for point in own["points"])
    points = [
        {
            "value": str(point["value"]),
            "effect": number(point["wanted"]["with"] if told else point["kl_bits"]),
            "damage": number(point["lost"]),
        }
        for point in own["points"]
    ]
    effect = f"p({record['wanted']['text']!r})" if told else "KL at the next token, bits"
    tips = [
        alt.Tooltip("value:N", title=own["argument"]),
        alt.Tooltip("effect:Q", title=effect, format=".4~f"),
        alt.Tooltip("damage:Q", title="bits per byte lost", format="+.4~f"),
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("damage:Q", scale=alt.Scale(zero=False, padding=24), title="bits per byte lost"),
        y=alt.Y("effect:Q", scale=alt.Scale(zero=False, padding=24), title=effect),
    )
    layers = base.mark_point(size=90).encode(tooltip=tips) + base.mark_text(dy=-12).encode(text="value:N")
    text = f"Each mark is a value of {own['argument']}; up and to the left is better. Measured."
    return Plot("sweep", f"Effect against damage over {own['argument']}", text, layers, wide=True)
