"""Runs the programs of others over our models, prints a table and writes it: `make test-clients`.

    run.py --out benchmarks/results/clients.json [--kinds softmax,gqa] [--sdist transformers-5.23.0.tar.gz]

transformers' tests come out of the sdist of the transformers that is installed. Exit status 1 where something failed
for which reasons.py has no reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
from reasons import REASONS

from manyheads.runs.environment import environment

# As benchmarks name it for benchmarks/stale.py.
MEASURES = ("src/manyheads/models", "src/manyheads/mechanisms", "src/manyheads/softmax.py", "tests/clients")
WRITES = ("clients",)
HERE = Path(__file__).parent
# Imported by the tests of models, and left out of the sdist.
LEFT_OUT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
CLIENTS = ("torch", "transformers", "peft", "accelerate", "captum", "lm_eval", "diffusers")


def main() -> int:
    parser = argparse.ArgumentParser(description="The programs of others over our models.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(models.KINDS), help="of layers, separated by commas")
    parser.add_argument("--sdist", type=Path, help="of transformers; else pip downloads it")
    given = parser.parse_args()
    start, cases = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        tests = unpacked(given.sdist or downloaded(Path(folder)), Path(folder))
        for file in ("model_tests.py", "client_tests.py", "pipeline_tests.py"):
            cases += run(file, tests, given.kinds, Path(folder) / f"{file}.xml")
    report = summary(cases) | {
        "kinds": given.kinds.split(","),
        "versions": {name: version(name) for name in CLIENTS},
        "python": platform.python_version(),
        "environment": environment(),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    return 1 if report["failed"] else 0


def downloaded(folder: Path) -> Path:
    wanted = f"transformers=={version('transformers')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", wanted]
    subprocess.run([*pip, "--dest", str(folder)], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpacked(sdist: Path, folder: Path) -> Path:
    """The folder that holds the package `tests`."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    root = next(path for path in folder.glob("transformers-*") if path.is_dir())
    for name, mixin in LEFT_OUT.items():
        file = root / "tests" / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"class {mixin}:\n    pass\n")
    for package in (root / "tests", *(root / "tests" / Path(name).parent for name in LEFT_OUT)):
        (package / "__init__.py").touch()
    return root


def run(file: str, tests: Path, kinds: str, xml: Path) -> list[dict[str, Any]]:
    """One dict per test: client, model, kind, test, outcome, why."""
    paths = os.pathsep.join([str(HERE), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "CLIENTS_KINDS": kinds, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-c", os.devnull, "--rootdir", str(HERE), "-p", "no:cacheprovider", "-o", "python_classes=Test_*"]
    command = [sys.executable, "-m", "pytest", *options, "--tb=line", f"--junitxml={xml}", str(HERE / file)]
    with (xml.parent / "log").open("w") as log:
        subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    if not xml.exists():
        raise SystemExit((xml.parent / "log").read_text()[-4000:])
    return [case(element) for element in ElementTree.parse(xml).iter("testcase")]


def case(element: ElementTree.Element) -> dict[str, Any]:
    whole = element.get("name", "")
    name = whole.split("[")[0].removeprefix("test_")
    group = re.search(r"Test_(.+)_([a-z0-9]+)$", element.get("classname", ""))
    words = re.findall(r"\[(.*)\]", whole)
    outcome, why = "passed", ""
    for child in element:
        if child.tag in ("failure", "error", "skipped"):
            outcome, why = child.tag, (child.get("message") or "").split("\n")[0][:300]
    model = group[1].replace("_", "-") if group else next((m for m in models.MODELS if m in "".join(words)), "")
    kind = group[2] if group else next((k for k in models.KINDS if re.search(rf"\b{k}\b", "".join(words))), "")
    known = REASONS.get((model, name)) or REASONS.get((kind, name))
    if outcome == "skipped" or (outcome != "passed" and known):
        outcome, why = "not applicable", known or why
    client, test = ("ModelTesterMixin", name) if group else (name, whole)
    return {"client": client, "model": model, "kind": kind, "test": test, "outcome": outcome, "why": why}


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for each in cases:
        outcome = each["outcome"] if each["outcome"] in ("passed", "not applicable") else "failed"
        rows.setdefault((each["client"], each["model"], each["kind"]), Counter())[outcome] += 1
        if outcome == "not applicable":
            reasons.setdefault(each["why"], Counter())[each["test"]] += 1
    return {
        "rows": [
            dict(zip(("client", "model", "kind"), key, strict=True))
            | {o: counts[o] for o in ("passed", "not applicable", "failed")}
            for key, counts in rows.items()
        ],
        "not applicable": {why: dict(tests) for why, tests in sorted(reasons.items())},
        "failed": [each for each in cases if each["outcome"] not in ("passed", "not applicable")],
    }


def show(report: dict[str, Any]) -> None:
    columns = ("client", "model", "kind", "passed", "not applicable", "failed")
    print("  ".join(columns))
    for row in report["rows"]:
        print("  ".join(str(row[c]) for c in columns))
    for why, tests in report["not applicable"].items():
        print(f"not applicable, {sum(tests.values())}: {why}")
    for each in report["failed"]:
        print(f"FAILED {each['client']} {each['model']} {each['kind']} {each['test']}: {each['why']}")


if __name__ == "__main__":
    raise SystemExit(main())
