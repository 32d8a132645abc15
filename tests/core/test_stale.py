"""benchmarks/stale.py on repositories made here: which results are older than what they measure."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def stale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stale", ROOT / "benchmarks" / "stale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(root: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    run = subprocess.run(["git", *who, *command], cwd=root, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def commit(root: Path, **files: str) -> str:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")
    return git(root, "rev-parse", "--short", "HEAD")


def result(root: Path, name: str, commit: str) -> None:
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"environment": {"commit": commit} if commit else {}}))


def test_results_beside_what_they_measure(stale: ModuleType, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    one = 'MEASURES = ("src/a.py",)\n'
    commit(tmp_path, src__a="1", src__b="1", benchmarks__one=one, benchmarks__two='MEASURES = ("src/b.py",)\n')
    first = commit(tmp_path, benchmarks__many='MEASURES = ("src/b.py",)\nWRITES = ("x", "y")\n')
    second = commit(tmp_path, src__a="2")
    told = {"one": first, "one-cuda": second, "two": first, "two-b": f"{first}+changes", "x": first, "y": second}
    for name, at in (told | {"nobody": first, "two-c": "", "two-d": "0123abc", "one-e": f"{first}+changes"}).items():
        result(tmp_path, name, at)
    assert {row[0]: row[2] for row in stale.states(tmp_path)} == {
        "one": "older",
        "one-cuda": "fresh",
        "one-e": "older",
        "two": "fresh",
        "two-b": "unknown",  # changes that nobody kept may have been measured
        "two-c": "unknown",
        "two-d": "unknown",
        "x": "fresh",
        "y": "fresh",
        "nobody": "unknown",
    }
    (tmp_path / "src" / "b.py").write_text("not committed")
    assert {row[0]: row[2] for row in stale.states(tmp_path)}["two"] == "older"


def test_a_part_that_was_measured_anew_does_not_make_the_others_fresh(stale: ModuleType, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    first = commit(tmp_path, src__a="1", benchmarks__one='MEASURES = ("src/a.py",)\n')
    second = commit(tmp_path, src__a="2")
    result(tmp_path, "one", second)
    path = tmp_path / "benchmarks" / "results" / "one.json"
    held = json.loads(path.read_text())
    for rows, state in (([{"commit": first}, {"commit": second}], "older"), ([{"commit": second}, {}], "fresh")):
        path.write_text(json.dumps({**held, "rows": rows}))
        assert [row[1:3] for row in stale.states(tmp_path)] == [(first if state == "older" else second, state)]


def test_the_benchmark_itself_counts(stale: ModuleType, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    result(tmp_path, "one", commit(tmp_path, src__a="1", benchmarks__one='MEASURES = ("src/a.py",)\n'))
    commit(tmp_path, benchmarks__one='MEASURES = ("src/a.py",)\nROUNDS = 3\n')
    assert [row[2] for row in stale.states(tmp_path)] == ["older"]


def test_without_git_it_says_so(
    stale: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    stale.main()
    assert capsys.readouterr().out.startswith("unknown: git is not installed")


def test_every_benchmark_that_saves_says_what_it_measures(stale: ModuleType) -> None:
    told = stale._measures(ROOT)
    benchmarks = {paths[0] for paths in told.values()}
    saving = {
        p.name
        for p in (ROOT / "benchmarks").glob("*.py")
        if "save(" in p.read_text() and p.stem not in ("common", "stale")
    }
    assert {f"benchmarks/{name}" for name in saving} | {"tests/clients/run.py"} == benchmarks
    assert {"convert", "convert_speeds", "clients"} <= set(told)
    assert [path for paths in told.values() for path in paths if not (ROOT / path).exists()] == []
