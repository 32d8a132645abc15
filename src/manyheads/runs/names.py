"""Names with arguments, as they are typed."""

from __future__ import annotations

import re
from typing import Any

from manyheads.runs.given import parse_yaml, shown

_MOST = 10_000


def parse_names(text: str) -> Any:
    """'moba' and 'moba[block=64,top_k=2]' as `parse_name`; 'based,moba[block=64]' as a list of what it gives."""
    if len(text) > _MOST:
        return parse_name(text)
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) == 1:
        return parse_name(text)
    if not all(part.strip() for part in parts):
        raise ValueError(f"{shown(text)!r}: nothing stands beside one of its commas; want NAME,NAME,NAME")
    return [parse_name(part.strip()) for part in parts]


def parse_name(text: str) -> Any:
    """'moba' as it is; 'moba[block=64]' as {'name': 'moba', 'block': 64}."""
    if len(text) > _MOST:
        raise ValueError(f"{shown(text)!r} has {len(text):,} characters; want NAME[key=value,key=value]")
    found = re.fullmatch(r"([^\[\]]+)\[(.*)\]", text)
    if not found:
        return text
    arguments: dict[str, Any] = {"name": found[1]}
    for part in re.split(r",(?![^\[\]]*\])", found[2]) if found[2] else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{text!r}: {part!r} is no argument; want NAME[key=value,key=value]")
        if key.strip() in arguments:
            what = "the name stands before the bracket" if key.strip() == "name" else "give it once"
            raise ValueError(f"{text!r}: {key.strip()!r} is there twice; {what}")
        arguments[key.strip()] = parse_yaml(value, f"{shown(text)!r}: {key.strip()}")
    return arguments
