"""Runs again what `stale.py` does not call fresh of the results that ship, then makes what ships: `make board`.

Minutes to an hour for each result on a small machine. Left as they are, with a word: results of benchmarks that want an
environment of their own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import figures
import stale

# It imports packages that do not stand beside manyheads: see `--make-env` in README.md.
ELSEWHERE = ("peers",)


def refresh(states: Sequence[tuple[str, str, str, str]], run: Callable[[list[str]], None]) -> list[str]:
    """Runs the command of each shipped result that is not fresh; says what was done, a line for each."""
    commands = {name: source["command"] for name, source in figures.figures()["sources"].items()}
    said = []
    for name, _, state, why in states:
        if name not in commands:
            continue
        if state == "fresh":
            said.append(f"{name}: fresh")
        elif name in ELSEWHERE:
            said.append(f"{name}: {state} ({why}), left as it is: it wants an environment of its own, see README.md")
        else:
            run([sys.executable, *commands[name].split()[1:]])
            said.append(f"{name}: was {state} ({why}), measured again")
    return said


def _run(command: list[str]) -> None:
    print("running", *command[1:], flush=True)
    subprocess.run(command, check=True, cwd=stale.ROOT)


def main() -> None:
    for line in refresh(stale.states(stale.ROOT), _run):
        print(line)
    figures.TARGET.write_text(figures.text(), encoding="utf-8")


if __name__ == "__main__":
    main()
