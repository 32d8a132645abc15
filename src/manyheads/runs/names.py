"""Names with arguments, as they are typed."""

from __future__ import annotations

import re
from typing import Any

import yaml


def parse_name(text: str) -> Any:
    """'moba' as it is; 'moba[block=64]' as {'name': 'moba', 'block': 64}."""
    found = re.fullmatch(r"([^\[\]]+)\[(.*)\]", text)
    if not found:
        return text
    arguments: dict[str, Any] = {"name": found[1]}
    for part in re.split(r",(?![^\[\]]*\])", found[2]) if found[2] else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{text!r}: {part!r} is no argument; want NAME[key=value,key=value]")
        arguments[key.strip()] = yaml.safe_load(value)
    return arguments
