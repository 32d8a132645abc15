"""Healing by two processes is healing by one: the command as torchrun starts it, and what cannot be shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import ranks, together
from transformers import AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert.ranks import Ranks

COMMAND = [
    "--kv-heads", "2", "--align", "mean", "--heal", "2k", "--windows", "1", "--keys", "1", "--length", "128",
    "--calibrate", "256", "--lr", "0.001",
]  # fmt: skip


def test_two_processes_heal_as_one_does(tmp_path: Path, halved: str) -> None:
    both = together("-m", "manyheads", "convert", halved, *COMMAND, "--out", tmp_path / "two", envs=ranks(2))
    assert [done.returncode for done in both] == [0, 0], "".join(done.stderr[-2000:] for done in both)
    assert "".join(done.stdout for done in both).count("written:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]
    with pytest.raises(SystemExit) as end:
        main(["convert", halved, *COMMAND, "--out", str(tmp_path / "one")])
    assert not end.value.code
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def test_rows_are_shared_out_evenly_or_not_at_all() -> None:
    rows = torch.arange(8)
    shares = [Ranks(rank, 4).own(rows).tolist() for rank in range(4)]
    assert sorted(row for share in shares for row in share) == rows.tolist()
    assert {len(share) for share in shares} == {2}
    with pytest.raises(ValueError, match="3 processes for the 8 rows of a step: launch a number that divides 8"):
        Ranks(0, 3).check(8)
