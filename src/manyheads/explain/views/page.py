"""Pages: views and what they show in one HTML file that asks nothing of any other.

Scripts and styles are written into the file, and a policy in its head lets nothing else run and nothing be fetched.
Tokens, titles and names come from outside: they are JSON without a `<`, and the scripts put them on the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

KINDS = ("head", "model", "neuron", "flow", "text", "image", "maps", "table", "embedding", "drawing")
THEMES = ("auto", "light", "dark")


class View(Protocol):
    """A view and what it shows; see view.py."""

    @property
    def kind(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def payload(self) -> dict[str, Any]: ...

    @property
    def blobs(self) -> dict[str, bytes]: ...

    @property
    def theme(self) -> str: ...


def write_page(
    path: str | Path, views: Sequence[View], *, title: str = "manyheads", note: str = "", theme: str = "auto"
) -> Path:
    """Writes the views as one page; several stand behind tabs. note: a line below the title."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(views, title=title, note=note, theme=theme), encoding="utf-8")
    return target


def page(views: Sequence[View], *, title: str = "manyheads", note: str = "", theme: str = "auto") -> str:
    """The page as a string."""
    if not views:
        raise ValueError("a page needs at least one view")
    spec = page_spec(views, title=title, note=note, theme=theme)
    run = script(tuple(dict.fromkeys(kinds_of(views)))) + "\nmanyheads.start();\n"
    look = style()
    policy = (
        f"default-src 'none'; script-src '{_hash(run)}'; style-src '{_hash(look)}'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    blobs = {name: data for view in views for name, data in view.blobs.items()}
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{html.escape(title)}</title>\n<style>{look}</style>\n</head>\n<body>\n",
            '<div id="mh-page" class="mh"><noscript>This page shows its views with JavaScript.</noscript></div>\n',
            f'<script type="application/json" id="mh-spec">{safe_json(spec)}</script>\n<script>{run}</script>\n',
            # Last, so that the view stands while they are still being read.
            *(
                f'<script type="text/plain" id="mh:{html.escape(name)}">{base64.b64encode(data).decode()}</script>\n'
                for name, data in blobs.items()
            ),
            "</body>\n</html>\n",
        ]
    )


def page_spec(views: Sequence[View], *, title: str, note: str = "", theme: str = "auto") -> dict[str, Any]:
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}; got {theme!r}")
    shown = [{"kind": view.kind, "title": view.title, "data": view.payload} for view in views]
    return {"title": title, "note": note, "theme": theme, "views": shown}


def kinds_of(views: Sequence[View]) -> list[str]:
    """The scripts that the views need: the model view opens heads."""
    unknown = [view.kind for view in views if view.kind not in KINDS]
    if unknown:
        raise ValueError(f"no view of kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    return [kind for view in views for kind in (["head", "model"] if view.kind == "model" else [view.kind])]


@cache
def script(kinds: tuple[str, ...]) -> str:
    return "\n".join(_static(f"{name}.js") for name in ("core", *kinds))


@cache
def style() -> str:
    return _static("views.css")


def safe_json(value: Any) -> str:
    """JSON that can stand in a script element: no `<`, and NaN is refused."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for unsafe in "<>&\u2028\u2029":
        text = text.replace(unsafe, f"\\u{ord(unsafe):04x}")
    # Half a surrogate pair, as byte-level tokens can hold, cannot be written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _static(name: str) -> str:
    return (files("manyheads.explain.views") / "static" / name).read_text(encoding="utf-8")
