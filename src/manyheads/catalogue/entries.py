"""What `find` searches: every mechanism, and every paper of the catalogue that is no mechanism here.

`papers.json` holds the catalogue's 273 papers: title, what is in them, published code, the mechanisms here that are of
them, and for what is no mechanism the line that uses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from manyheads.catalogue.columns import COLUMNS, written
from manyheads.catalogue.index import names, told

# What a reader calls things that a card says in a word or a formula.
_PATTERNS = {
    "noncausal-self": "encoder, bidirectional, all tokens see each other",
    "causal-self": "decoder, autoregressive language model, generation, causal",
    "noncausal-cross": "cross attention from one sequence to another, conditioning on a context",
    "causal-cross": "cross attention of a decoder to a context",
    "grid": "images, pictures, vision, two dimensions",
    "grid-cross": "images, pictures, vision, conditioned on a context",
    "volume": "volumes, three dimensions, medical scans, video",
    "maps": "several feature maps of different sizes, pyramid, vision, detection, segmentation",
    "pool": "pooling a set or sequence into one vector, aggregate, classification of bags of instances",
    "graph": "graphs, nodes and edges, neighbours",
}


@dataclass(frozen=True)
class Entry:
    """name: of the mechanism, or of the paper's catalogue row (`paper 256`). lead: in a few words; body: all that is
    searched beside it. use: the lines of code that use it, empty where it is not in manyheads."""

    name: str
    title: str
    lead: str
    body: str
    reference: str
    cost: str = ""
    mechanism: bool = False
    use: str = ""


@cache
def papers() -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = json.loads(
        files("manyheads.catalogue").joinpath("papers.json").read_text(encoding="utf-8")
    )
    return found


@cache
def entries() -> list[Entry]:
    """Mechanisms by name, then the papers that are none."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    titles = {_plain(told(name)["title"]): name for name in names()}
    rest = []
    for paper in papers():
        known = {*paper["mechanisms"], *filter(None, [titles.get(_plain(paper["title"]))])}
        for name in known:
            of.setdefault(name, []).append(paper)
        if not known or paper["use"]:
            rest.append(_of_paper(paper))
    return [_of_mechanism(name, of.get(name, [])) for name in names()] + rest


def _plain(title: str) -> str:
    return re.sub(r"[^a-z0-9]", "", title.lower())


def _of_mechanism(name: str, about: list[Mapping[str, Any]]) -> Entry:
    known = told(name)
    text = known["description"]
    claim = " ".join(text.split("\n\n")[0].split())
    body = [
        *(f"{paper['title']}: {paper['about']}" for paper in about),
        _growth(known),
        *(_PATTERNS[pattern] for pattern in known["patterns"]),
        known["notes"],
        known["family"],
        *known["takes"].values(),
        text,
    ]
    return Entry(name, known["title"], claim, "\n".join(body), known["reference"], cost(known), mechanism=True)


def _of_paper(paper: Mapping[str, Any]) -> Entry:
    lead = paper["about"] or paper["title"]
    reference = " · ".join(filter(None, [paper["title"], paper.get("code", "")]))
    kind = str(paper["kind"]).replace("-", " ")
    return Entry(f"paper {paper['id']}", paper["title"], lead, kind, reference, use=paper["use"])


def _growth(told: Mapping[str, Any]) -> str:
    """Time and memory in words; a formula without n beside its factors does not grow with the length."""
    variables = re.findall(r"[a-z_]+", told["state"])
    words = [] if re.search(r"[nm]\^2|n m", told["time"]) else ["linear time, fast on long sequences and documents"]
    if told["decodes"] and "n" not in variables:
        words.append("constant memory while decoding, a state of fixed size however long the text")
    return "; ".join(words)


def cost(told: Mapping[str, Any]) -> str:
    """`time n, state 1; measured here: recall 99.3%, exponent 1.02`."""
    growth = f"time {told['time']}" + (f", state {told['state']}" if told["decodes"] else "")
    known = [f"{key} {written(told, key)}" for key, kept in COLUMNS.items() if kept.write and told[key] is not None]
    return f"{growth}; measured here: {', '.join(known)}" if known else f"{growth}; not measured here"


def use(entry: Entry) -> str:
    """The lines of code."""
    return str(told(entry.name)["example"]) if entry.mechanism else entry.use
