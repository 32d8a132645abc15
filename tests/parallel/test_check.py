"""The command that shows that all schemes agree, as torchrun starts it and without."""

import pytest
from forked import ranks, together

from manyheads.parallel import check


def test_two_processes() -> None:
    both = together("-m", "manyheads.parallel.check", envs=ranks(2))
    assert [done.returncode for done in both] == [0, 0], "".join(done.stderr for done in both)
    title, _, *lines = "".join(done.stdout for done in both).splitlines()
    assert title.startswith("processes: 2, each on ")
    assert len(lines) == len(check.schemes(4))
    assert all(line.endswith("equal") for line in lines)


def test_alone_and_where_one_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "LENGTH", 40)
    calls = []

    def drifts(q, k, v, layout):
        calls.append(layout)
        return q + k + v + len(calls)

    monkeypatch.setattr(check, "schemes", lambda heads: [check.Scheme("drifts", "zigzag", drifts)])
    assert check.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("DIFFERS")
