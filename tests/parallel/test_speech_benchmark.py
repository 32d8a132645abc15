"""benchmarks/speech.py on a setting of seconds: utterances that can be read, and every row that the page shows."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, found)
    spec.loader.exec_module(found)
    return found


def test_frames_tell_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    speech = module("speech", monkeypatch)
    monkeypatch.setattr(speech, "SLIPS", 0.0)
    frames, tokens = speech.utterance(random.Random(0), 30)
    codes = [frame for i, frame in enumerate(frames) if i == 0 or frames[i - 1] != frame]
    before, told = 0, []
    for token in tokens:
        own = token - speech.FIRST
        code = speech.FIRST + speech.TOKENS + 4 * own + before % 4
        told += [] if told and told[-1] == code else [code]
        before = own
    assert codes == told
    assert 2 * 30 <= len(frames) <= 6 * 30


def test_a_tiny_setting_gives_every_row_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    speech, page = module("speech", monkeypatch), module("page", monkeypatch)
    rows = speech.measured(speech.TINY)
    assert [row["part"] for row in rows] == ["depth"] * 3 + ["batches"] * 3
    assert [row["batches"] >= 12 // max(row["sizes"]) for row in rows[3:]] == [True] * 3
    sizes = [row["parameters"] for row in rows[:3]]
    assert max(sizes) < 1.15 * min(sizes)
    table = page._speech(rows)
    assert sum("|" in line for line in table) == 2 * 2 + 6
