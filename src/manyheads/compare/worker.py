"""Runs one cell, here, in a process of its own, or on another machine; whatever happens becomes a row."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from manyheads.runs.outcome import failure, memory_bounded, outcome_of

from .hybrid import of_a_layer
from .measure import measure_decode, measure_memory, measure_speed, peak_memory
from .train import train_cell

_RUNNERS = {
    "quality": train_cell,
    "speed": of_a_layer(measure_speed),
    "memory": of_a_layer(measure_memory),
    "decode": of_a_layer(measure_decode),
}


def run_cell(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of one cell: its measured columns with `status`, `error` and `seconds`. Raises nothing but
    KeyboardInterrupt and its like."""
    return outcome_of(lambda: _RUNNERS[kind](settings))


def main() -> None:
    """A fresh process for one peak: settings as JSON on stdin, the outcome as JSON on the last line of stdout."""
    settings = json.loads(sys.stdin.read())
    try:
        with memory_bounded():
            outcome = peak_memory(settings)
    except Exception as error:
        outcome = failure(error)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
