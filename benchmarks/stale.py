"""Which committed results are older than the code that they measure: `python benchmarks/stale.py`.

A benchmark names the paths that it measures, from the root of the repository, in MEASURES, and in WRITES the results
that do not have its own name. A result is fresh where the last commit that touched them, or the benchmark, is part of
the commit that it records (a row may record its own); one that was measured with uncommitted changes is not called
fresh.
"""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    if _git(ROOT, "rev-parse", "--show-toplevel") is None:
        print("unknown: git is not installed or this is no checkout, and only its log says when code changed")
        return
    print("| result | commit | state | why |\n|---|---|---|---|")
    for row in states(ROOT):
        print("| " + " | ".join(row) + " |")


def states(root: Path) -> list[tuple[str, str, str, str]]:
    """Name, recorded commit, "fresh", "older" or "unknown", and why, of each result under root/benchmarks/results."""
    measures = _measures(root)
    rows = []
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        paths = measures.get(path.stem) or measures.get(path.stem.split("-")[0]) or ()
        # Of parts that were measured at several commits the one that is least fresh.
        found = [(path.stem, commit or "none", *_state(root, commit, paths)) for commit in _recorded(path)]
        rows.append(max(found, key=lambda row: ("fresh", "unknown", "older").index(row[2])))
    return rows


def _state(root: Path, recorded: str, paths: tuple[str, ...]) -> tuple[str, str]:
    commit, _, changes = recorded.partition("+")
    if not paths:
        return "unknown", "no benchmark says in MEASURES what it measures"
    gone = [path for path in paths if not (root / path).exists()]
    if gone:
        return "unknown", f"MEASURES names what is not there: {', '.join(gone)}"
    if not commit or _git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is None:
        return "unknown", "its commit is not in this checkout"
    if _git(root, "status", "--porcelain", "--", *paths):
        return "older", "what it measures has uncommitted changes"
    for what, part in (("code", paths[1:]), ("the benchmark", paths[:1])):
        last = _git(root, "log", "-1", "--format=%H", "--", *part)
        if not last:
            return "unknown", "no commit holds what it measures"
        if _git(root, "merge-base", "--is-ancestor", last, commit) is None:
            return "older", f"{what} changed in {_git(root, 'log', '-1', '--format=%h %cs', last)}"
    return ("unknown", "measured with uncommitted changes") if changes else ("fresh", "")


def _measures(root: Path) -> dict[str, tuple[str, ...]]:
    """By result, the paths that it measures; read, not imported: some benchmarks need packages of their own."""
    found: dict[str, tuple[str, ...]] = {}
    for path in [*sorted((root / "benchmarks").glob("*.py")), *sorted((root / "tests" / "clients").glob("run.py"))]:
        told = {
            target.id: ast.literal_eval(line.value)
            for line in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(line, ast.Assign)
            for target in line.targets
            if isinstance(target, ast.Name) and target.id in ("MEASURES", "WRITES")
        }
        if "MEASURES" in told:
            paths = (path.relative_to(root).as_posix(), *told["MEASURES"])
            found |= dict.fromkeys(told.get("WRITES", (path.stem,)), paths)
    return found


def _recorded(path: Path) -> list[str]:
    """The commits of its rows, where they have one each; else that of its environment."""
    held = json.loads(path.read_text(encoding="utf-8"))
    held = held if isinstance(held, dict) else {}
    last = str(held.get("environment", {}).get("commit", ""))
    rows = held.get("rows")
    own = [str(row.get("commit", last)) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return list(dict.fromkeys(own)) or [last]


def _git(root: Path, *command: str) -> str | None:
    """What git prints; None where it is missing or says no."""
    try:
        run = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if run.returncode else run.stdout.strip()


if __name__ == "__main__":
    main()
