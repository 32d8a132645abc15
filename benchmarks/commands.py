"""The commands of the README on a real model, each as typed, in a process and a folder of its own.

    python benchmarks/commands.py              # explain, heads and shrink on smollm2; about eight minutes
    python benchmarks/commands.py explain      # these alone

seconds: from Enter to the prompt, with all threads that torch takes by itself. cpu_s: of all cores. first_s: until it
says anything. guess: the time that it said was left when a third had passed, over what was left in truth. The model is
decoded from its GGUF once, before.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import here, kept, save

MEASURES = (
    "src/manyheads/explain",
    "src/manyheads/heads",
    "src/manyheads/shrink",
    "src/manyheads/hosts",
    "src/manyheads/runs",
)

SENTENCE = (
    "When the lighthouse keeper found the old map, she knew that the harbour had moved twice, and that the bell of the "
    "drowned church still rang at low tide in winter."
)
UNITS = {"s": 1, "min": 60, "h": 3600}
LEFT = re.compile(r"(?:about|over) ([0-9.]+) (s|min|h) left")


TEXT = "text.txt"


def commands() -> dict[str, tuple[float, list[str]]]:
    """Title: the target in seconds, and the words behind `manyheads`, in a folder that holds TEXT."""
    shrunk = ["--policy", "snapkv", "--policy", "streaming", "--compression-ratio", "0.5"]
    return {
        "explain, 34 tokens": (25, ["explain", "smollm2", "--text", SENTENCE]),
        "explain, 512 tokens": (90, ["explain", "smollm2", "--file", TEXT]),
        "heads": (240, ["heads", "smollm2"]),
        "shrink, two policies": (240, ["shrink", "smollm2", *shrunk]),
    }


def seconds_left(line: str) -> float | None:
    """What a line of progress says is left."""
    found = LEFT.search(line)
    return None if found is None else float(found[1]) * UNITS[found[2]]


def guess(said: list[tuple[float, float]], whole: float) -> float | None:
    """said: when, and what was left then. Of the first word after a third of the time: said over true."""
    later = [(at, left) for at, left in said if at >= whole / 3 and at < whole]
    return later[0][1] / (whole - later[0][0]) if later else None


def run(words: list[str], folder: Path) -> dict[str, Any]:
    before, began = _children(), time.perf_counter()
    first: float | None = None
    said: list[tuple[float, float]] = []
    with (folder / "stdout").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "manyheads", *words], cwd=folder, stdout=out, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:  # universal newlines: a carriage return ends one as well
            now = time.perf_counter() - began
            first = now if first is None else first
            if (left := seconds_left(line)) is not None:
                said.append((now, left))
        code = process.wait()
    whole = time.perf_counter() - began
    if code:
        raise SystemExit(f"manyheads {' '.join(words)} ended with {code}")
    return {"seconds": whole, "cpu_s": _children() - before, "first_s": first, "guess": guess(said, whole)}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    from manyheads.hosts.loading import load_model
    from manyheads.hosts.questions import Questions

    wanted = sys.argv[1:]
    if strange := [word for word in wanted if not any(title.startswith(word) for title in commands())]:
        raise SystemExit(f"no command {', '.join(strange)}; want some of explain, heads, shrink")
    loaded = load_model("smollm2")
    (window,) = Questions(loaded).windows(512, 1)
    with tempfile.TemporaryDirectory() as name:
        chosen = {
            title: own
            for title, own in commands().items()
            if not wanted or any(title.startswith(word) for word in wanted)
        }
        rows, now = [row for row in kept("commands") if row["command"] not in chosen], here()
        for number, (title, (target, words)) in enumerate(chosen.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            (folder / TEXT).write_text(loaded.tokenizer.decode(window), encoding="utf-8")
            shown = " ".join(["manyheads", *(f'"{word}"' if " " in word else word for word in words)])
            rows.append({"command": title, "typed": shown, **run(words, folder), "target": target, **now})
    save("commands", "cpu", rows)


if __name__ == "__main__":
    main()
