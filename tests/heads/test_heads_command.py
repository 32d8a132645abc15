"""`manyheads heads` as a user types it: what it writes, what it repeats after a stop, and what it refuses."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import Program
from rich.console import Console
from transformers import BertConfig, BertLMHeadModel
from written_heads import random_llama

from manyheads.cli import main
from manyheads.heads import Profile, command, read_duo, read_retrieval
from manyheads.hosts.loading import Loaded
from manyheads.runs.memory import within_memory
from manyheads.runs.steps import Progress, Tell
from manyheads.shrink import Duo


def heads(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["heads", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random model on disk."""
    random_llama().model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_everything_of_the_packaged_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, packaged: Loaded) -> None:
    out = tmp_path / "out"
    code, printed, err = heads(capsys, "--length", 256, "--steps", 3, "--out", out)
    assert code == 0
    assert printed.startswith("top heads of byte_llama, as layer.head from 0: 4 layers of 8 query heads on 4 KV heads")
    for name in command.MEASURES:
        assert name in printed
    assert "gates: measured in" in err
    profile = Profile.load(out, packaged.model)
    assert {name: tuple(values.shape) for name, values in profile.scores.items()} == {
        **dict.fromkeys(("retrieval", "echo", "induction", "sink", "local", "previous", "duplicate"), (4, 8)),
        "gates": (4, 4),
        "influence": (6, 2, 4, 8),
    }
    assert profile.settings["retrieval"]["found"] > 0
    trials = read_retrieval(out / "retrieval_head.json")
    torch.testing.assert_close(trials.mean(-1).float(), profile.scores["retrieval"])
    pattern = read_duo(out / "duo")
    assert (pattern.model_name, pattern.sink_size, pattern.recent_size) == ("byte_llama", 8, 32)
    torch.testing.assert_close(pattern.gates.float(), profile.scores["gates"])
    Duo(gates=Duo.read_gates(out / "duo" / "full_attention_heads.tsv"), compression_ratio=0.5)

    before = (out / "heads.safetensors").read_bytes()
    code, printed, err = heads(capsys, "--length", 256, "--steps", 3, "--out", out, "--json")
    assert code == 0
    assert err.count("already in") == 5
    told = json.loads(printed)
    assert told["files"]["DuoAttention pattern"] == str(out / "duo")
    assert told["scores"]["gates"] == profile.scores["gates"].tolist()
    assert (out / "heads.safetensors").read_bytes() == before


def test_only_what_changed_is_measured_again(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words and some more of them, " * 9)
    common = (folder, "--length", 128, "--out", tmp_path / "out", "--measure", "echo,sink")
    assert "echo, induction: measured" in heads(capsys, *common)[2]
    _, _, err = heads(capsys, *common, "--text", text)
    assert "echo: already in" in err
    assert "sink, local, previous, duplicate: measured" in err
    _, _, err = heads(capsys, *common, "--text", text, "--seed", 1)
    assert "already" not in err
    code, out, _ = heads(capsys, folder, "--length", 128, "--out", tmp_path / "out", "--measure", "duplicate")
    assert code == 0
    assert "duplicate" in out


def test_no_needle_found_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    code, _, err = heads(capsys, folder, "--length", 256, "--out", tmp_path / "out", "--measure", "retrieval")
    assert code == 0
    assert "none of 15 needles was found" in err
    assert not Profile.load(tmp_path / "out").scores["retrieval"].any()
    assert not (tmp_path / "out" / "retrieval_head.json").exists()


def test_a_killed_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    arguments = [folder, "--length", 192, "--steps", 100, "--measure", "echo,gates", "--out", tmp_path / "out"]
    process = Program("-m", "manyheads", "heads", *arguments)
    partial = tmp_path / "out" / "gates.partial.safetensors"
    end = time.monotonic() + 300
    while not partial.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(Profile.load(tmp_path / "out").scores) == ["echo", "induction"]
    progress: list[int] = []
    watched = command.Study(str(folder), tmp_path / "out", length=192, steps=100, progress=Watched(progress))
    watched.run(["echo", "gates"])
    assert progress[0] > 10
    assert progress[-1] == 100
    assert not partial.exists()
    assert "gates" in Profile.load(tmp_path / "out").scores


class Watched(Progress):
    """Notes the steps that are told."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(Console(quiet=True))
        self.steps = steps

    @contextmanager
    def measure(self, name: str, work: Sequence[float] = ()) -> Iterator[Tell]:
        yield lambda done, total, text: self.steps.append(done)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measure", "echos"], "want some of retrieval, echo"),
        (["--measure", ","], "got none"),
        (["--length", "32"], "can be measured with 64 to 4096 tokens"),
        (["--length", "9999"], "can be measured with 64 to 4096 tokens"),
        (["--length", "100", "--measure", "retrieval"], "give a greater --length"),
        (["--steps", "0", "--measure", "gates"], "steps must be at least 1"),
        (["--text", "missing.txt"], "cannot be read"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--text", "short.txt", "--measure", "sink"], "short.txt has 5 tokens; at least 136"),
        (["--text", "binary.txt"], "is not UTF-8 text"),
        (["no/such/folder"], "does not exist"),
        (["bare"], "has no config.json"),
        (["bert"], "is not a causal language model"),
        (["--out", "short.txt"], "is a file: give a folder"),
        (["--out", "damaged"], "is not a head profile that can be read"),
        (["--out", "other"], "is a head profile of another model"),
    ],
)
def test_what_cannot_be_done_is_told(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty.txt", b""), ("short.txt", b"short"), ("binary.txt", b"\xff\xfe\0")):
        Path(name).write_bytes(content)
    Path("bare").mkdir()
    Path("damaged").mkdir()
    Path("damaged/heads.safetensors").write_bytes(b"cbuiltins\neval\n(S'1 / 0'\ntR.")
    if "other" in arguments:
        heads(capsys, *saved(tmp_path), "--out", "other", "--measure", "echo", "--length", "64")
    if "bert" in arguments:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertLMHeadModel(BertConfig(vocab_size=256, **small)).save_pretrained("bert")
    code, _, err = heads(capsys, *arguments)
    assert code == 2
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def saved(tmp_path: Path) -> list[str]:
    random_llama().model.save_pretrained(tmp_path / "random")
    return [str(tmp_path / "random")]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_short_memory_halves_the_length(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a try is collected before the next; here that would look through thousands of tests."""
    notes: list[str] = []
    collected: list[int] = []
    monkeypatch.setattr("manyheads.runs.memory.gc.collect", lambda: collected.append(len(notes)))

    def measure(length: int) -> str:
        if length > 200:
            raise error
        return "done"

    assert within_memory(measure, 512, notes.append) == ("done", 128)
    assert notes == ["out of memory: again with 256 tokens", "out of memory: again with 128 tokens"]
    assert collected == [0, 1]
    with pytest.raises(ValueError, match="out of memory even with 100 tokens"):
        within_memory(lambda length: measure(300), 100)


def test_other_errors_are_not_taken_for_it() -> None:
    def measure(length: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(measure, 512)
