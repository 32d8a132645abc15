"""The catalogue page, generated from the cards: `python -m manyheads.catalogue > docs/catalogue.md`."""

from __future__ import annotations

import inspect

from manyheads.card import Family
from manyheads.registry import list_attentions, mechanism_class
from manyheads.softmax import changed_stages


def catalogue_page() -> str:
    """Markdown: a table of every mechanism, then what each one is."""
    names = list_attentions()
    lines = [
        "# The catalogue",
        "",
        f"{len(names)} mechanisms. This page is generated from their cards; `manyheads show NAME` prints one of them.",
        "Time and state are growth formulas in the length n; what is measured stands in a comparison's report.",
        "",
        "| name | family | patterns | time | state | changes | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cls = mechanism_class(name)
        card = cls.card
        stages = changed_stages(cls)
        changes = "own forward" if stages == ["attend"] else ", ".join(stages) or "parameters only"
        patterns = ", ".join(sorted(card.patterns))
        row = [f"[{name}](#{name})", str(card.family), patterns, card.time, card.state, changes, card.reference]
        lines.append("| " + " | ".join(row) + " |")
    for family in Family:
        for name in list_attentions(family=family):
            lines += ["", f"## {name}", "", *_entry(name)]
    return "\n".join(lines) + "\n"


def _entry(name: str) -> list[str]:
    cls = mechanism_class(name)
    lines = [f"*{cls.card.title}*, {cls.card.reference}", "", "```text", inspect.getdoc(cls) or "", "```"]
    for key, what in cls.card.takes.items():
        lines += ["", f"Reads `{key}` beside its tokens: {what}."]
    return [*lines, "", cls.card.notes] if cls.card.notes else lines


if __name__ == "__main__":
    print(catalogue_page(), end="")
