"""What the classes say of themselves, as it ships: `index.json`, so that a list or a search imports no torch.

`python -m manyheads.catalogue --index` writes it. It counts while the sources that it was read from are unchanged and
no other package brings mechanisms; else the classes are asked, which takes the time of importing them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from manyheads.card import Family, Pattern
from manyheads.catalogue.figures import load_figures
from manyheads.near import member, suggest

_ROOT = Path(__file__).parent.parent
_SHIPPED = Path(__file__).parent / "index.json"
_BASES = ("card.py", "mechanism.py", "shell.py", "softmax.py", "catalogue/facts.py")


def digest() -> str:
    """Of all sources that the index is read from."""
    found = hashlib.sha256()
    for path in sorted([*(_ROOT / "mechanisms").rglob("*.py"), *(_ROOT / name for name in _BASES)]):
        found.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def write_index() -> None:
    text = json.dumps({"digest": digest(), "mechanisms": _asked()}, indent=1, ensure_ascii=False)
    _SHIPPED.write_text(text + "\n", encoding="utf-8", newline="\n")


def _asked() -> list[dict[str, Any]]:
    from manyheads.catalogue.facts import description
    from manyheads.registry import list_attentions

    return [description(name) for name in list_attentions()]


@cache
def _held() -> Mapping[str, Mapping[str, Any]]:
    kept = json.loads(_SHIPPED.read_text(encoding="utf-8")) if _SHIPPED.is_file() else {}
    known = kept.get("digest") == digest() and not entry_points(group="manyheads.mechanisms")
    return {told["name"]: told for told in (kept["mechanisms"] if known else _asked())}


def names(*, family: str | None = None, pattern: str | None = None) -> list[str]:
    """As `list_attentions`."""
    family = None if family is None else member(Family, family)
    pattern = None if pattern is None else member(Pattern, pattern)
    return [
        name
        for name, told in _held().items()
        if family in (None, told["family"]) and (pattern is None or pattern in told["patterns"])
    ]


def told(name: str) -> dict[str, Any]:
    """What `description` gives, and its measured figures (None where there is none). ValueError with near names for an
    unknown one."""
    held = _held()
    if name not in held:
        raise ValueError(f"unknown mechanism {name!r}{suggest(name, held)} (`manyheads list` names all {len(held)})")
    return {**held[name], **load_figures().summary(name)}
