"""The measured figures that ship with the package, made from the results: `python benchmarks/figures.py`.

Writes src/manyheads/catalogue/figures.json: every row of these results that is of one mechanism, as it stands there.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from manyheads.catalogue.figures import FORMAT

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TARGET = ROOT / "src" / "manyheads" / "catalogue" / "figures.json"
SHIPPED = ("recall", "digits", "linear", "vision", "peers")


def figures() -> dict[str, Any]:
    scripts = _scripts()
    sources: dict[str, Any] = {}
    rows: dict[str, dict[str, list[Any]]] = {}
    for name in SHIPPED:
        held = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        sources[name] = {"command": _command(name, scripts[name]), "environment": held["environment"]}
        for row in held["rows"]:
            if "mechanism" in row:
                of = rows.setdefault(row["mechanism"].split("[")[0], {})
                of.setdefault(name, []).append({k: _short(v) for k, v in row.items()})
    return {"format": FORMAT, "sources": sources, "rows": {key: rows[key] for key in sorted(rows)}}


def _short(value: Any) -> Any:
    """Five significant digits: more is noise, and a third of the file."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _scripts() -> dict[str, str]:
    """By result, the benchmark that writes it, as `stale.py` reads it off the benchmarks."""
    spec = importlib.util.spec_from_file_location("stale", Path(__file__).parent / "stale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: paths[0] for name, paths in module._measures(ROOT).items()}


def _command(name: str, script: str) -> str:
    return f"python {script}" if Path(script).stem == name else f"python {script} {name}"


def text() -> str:
    """A line for each mechanism, so that a changed figure shows as one."""
    held = figures()
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in held["rows"].items())
    head = json.dumps({"format": held["format"], "sources": held["sources"]}, indent=1)
    return head[: head.rindex("\n}")] + ',\n "rows": {\n' + rows + "\n }\n}\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"written to {TARGET.relative_to(ROOT)}")
