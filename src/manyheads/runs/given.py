"""Text, JSON and YAML from outside: bounded before it is read, and before it is parsed.

What cannot be used is a ValueError of one line. Parsers made for files of good will follow a small file as far as it
tells them to: ten nested anchors of ten items are 10 GB, and time grows with the square of how deep brackets nest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

MOST_TEXT = 64_000_000
MOST_JSON = 64_000_000
MOST_YAML = 256_000
# Of YAML: brackets within brackets, items with those that anchors repeat, characters of a value without quotes.
MOST_DEPTH, MOST_ITEMS, MOST_PLAIN = 32, 20_000, 1000
_OPENS = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
_CLOSES = (yaml.SequenceEndEvent, yaml.MappingEndEvent)


def shown(value: Any, most: int = 120) -> str:
    """A short repr, for an error: what nests without end, or has too many digits, too."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def read_bytes(path: str | Path, *, most: int) -> bytes:
    """The whole of a file of at most so many bytes: ValueError where it has more, OSError where it cannot be read.

    A pipe that nobody writes to is empty; a device is read no further than any file.
    """
    # Without O_NONBLOCK, opening such a pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if hasattr(os, "set_blocking"):
            os.set_blocking(descriptor, True)
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes: give a smaller file")
    return content


def read_text(path: str | Path, *, most: int = MOST_TEXT, what: str = "") -> str:
    """A file of UTF-8 text; ValueError where it is none. what: the option that names it, for errors.

    As Python's open() reads it: an editor's byte order mark and its carriage returns are no part of a text, and would
    be tokens of their own.
    """
    name = f"{what} {path}".strip()
    try:
        text = read_bytes(path, most=most).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}): give a file that can") from None


def parse_json(text: str | bytes, what: str) -> Any:
    """what: where it comes from, for errors."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deep to be read as JSON") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({shown(str(error))})") from None


def read_json(path: str | Path) -> Any:
    """ValueError where it is too large or no JSON, OSError where it cannot be read."""
    return parse_json(read_bytes(path, most=MOST_JSON), str(path))


def parse_yaml(text: str, what: str) -> Any:
    """what: where it comes from, for errors. Anchors may repeat, not contain themselves."""
    if len(text) > MOST_YAML:
        raise ValueError(f"{what} has {len(text):,} characters; want at most {MOST_YAML:,} of YAML")
    try:
        _bound(text, what)
    except yaml.YAMLError as error:
        raise _no_yaml(what, error) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _no_yaml(what, error) from None
    except (ValueError, KeyError, AttributeError, TypeError, ArithmeticError) as error:
        # What its constructors make of a tag on a value of another kind, and of a thirteenth month.
        raise ValueError(f"{what} is not YAML: a value does not fit its tag ({shown(error)})") from None


def _no_yaml(what: str, error: yaml.YAMLError) -> ValueError:
    return ValueError(f"{what} is not YAML: {shown(' '.join(str(error).split()), 300)}")


def _bound(text: str, what: str) -> None:
    """Counts, event by event, so that nothing that is too much is built: ValueError."""
    opened: list[tuple[str | None, int]] = []  # anchors of what is open, and the items before it
    sizes: dict[str, int] = {}
    items = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ValueError(f"{what}: {event.anchor!r} is used within itself; write out what is meant")
            items += sizes.get(event.anchor or "", 0)
        elif isinstance(event, _OPENS):
            opened.append((event.anchor, items))
            items += 1
        elif isinstance(event, _CLOSES):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = items - before
        elif isinstance(event, yaml.ScalarEvent):
            items += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.style is None and len(event.value) > MOST_PLAIN:
                raise ValueError(f"{what}: a value has {len(event.value):,} characters; put a long text into quotes")
        if len(opened) > MOST_DEPTH:
            raise ValueError(f"{what} is nested deeper than {MOST_DEPTH} levels; want a flatter one")
        if items > MOST_ITEMS:
            raise ValueError(f"{what} has more than {MOST_ITEMS:,} items, with those that anchors repeat; want fewer")
