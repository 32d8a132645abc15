"""A page for each family, made from the cards: `python -m manyheads.catalogue --families docs/families`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from manyheads.card import Family
from manyheads.catalogue.columns import COLUMNS, written
from manyheads.catalogue.index import names, told
from manyheads.catalogue.seen import seen, svg
from manyheads.registry import mechanism_class

_SHOWN = ("name", "time", "state", *(key for key, column in COLUMNS.items() if column.write))


def family_page(family: Family) -> str:
    """Markdown: a table of the family's mechanisms with their figures, then what each is, with its picture."""
    known = [told(name) for name in names(family=family)]
    lines = [
        f"# {family.value.capitalize()}",
        "",
        f"{len(known)} mechanisms of [the catalogue](../catalogue.md), generated from their cards and from",
        "[what was measured](../measured.md); blank is not measured. Pictures are drawn from small instances: dark",
        "where an output depends on an input whatever they hold, light where the content decides.",
        "",
        "| " + " | ".join(_SHOWN) + " |",
        "|" + "---|" * len(_SHOWN),
    ]
    for one in known:
        name = one["name"]
        lines.append("| " + " | ".join([f"[{name}](#{name})", *(written(one, key) for key in _SHOWN[1:])]) + " |")
    for one in known:
        name, text = one["name"], one["description"]
        lines += ["", f"## {name}", "", f"*{one['title']}*, {one['reference']}", ""]
        lines += [f"![who sees whom in {name}](pictures/{name}.svg)", "", "```text", text.split("\n\nSource")[0], "```"]
        lines += ["", one["notes"]] if one["notes"] else []
    return "\n".join(lines) + "\n"


def picture(name: str) -> str:
    return svg(seen(mechanism_class(name)), name)


def write_families(folder: Path) -> None:
    """All pages and pictures; those of what is gone are removed."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    wanted = {folder / f"{family.value}.md": partial(family_page, family) for family in Family}
    wanted |= {folder / "pictures" / f"{name}.svg": partial(picture, name) for name in names()}
    for old in (*folder.glob("*.md"), *folder.glob("pictures/*.svg")):
        if old not in wanted:
            old.unlink()
    for path, text in wanted.items():
        path.write_text(text(), encoding="utf-8")
