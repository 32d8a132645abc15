"""The text task: which files, which split, which windows, how many bits."""

import hashlib
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from manyheads.tasks import IGNORED, create_task
from manyheads.tasks.text import Text, in_evaluation, sources, standard_library, texts


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Sixty small files, each of one byte value of its own, and some that do not count."""
    for i in range(60):
        place = tmp_path / ("deep/er" if i % 3 == 0 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"module{i}.py").write_bytes(bytes([100 + i]) * (40 + i))
    for skipped in ("test/a.py", "tests/b.py", "site-packages/c.py", "deep/test/d.py", "_sysconfigdata_x.py", "e.txt"):
        (tmp_path / skipped).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / skipped).write_bytes(b"\x01" * 50)
    return str(tmp_path)


def test_files_of_the_folder(folder: str) -> None:
    found = sources(folder)
    assert len(found) == 60
    assert {Path(path).name for _, path in found} == {f"module{i}.py" for i in range(60)}
    assert found == sorted(found)
    assert all(digest == hashlib.sha256(path.encode()).digest() for digest, path in found)


def test_split_is_by_whole_files(folder: str) -> None:
    train, evaluation = texts(folder, 1_000_000)
    in_train, in_eval = set(train.tolist()) - {0}, set(evaluation.tolist()) - {0}
    assert in_train.isdisjoint(in_eval)
    assert in_train | in_eval == {100 + i for i in range(60)}
    for digest, path in sources(folder):
        value = 100 + int(Path(path).stem.removeprefix("module"))
        part = evaluation if in_evaluation(digest) else train
        assert int((part == value).sum()) == value - 60


def test_split_does_not_depend_on_the_folder_or_on_other_files(folder: str, tmp_path: Path) -> None:
    before = {path: in_evaluation(digest) for digest, path in sources(folder)}
    (tmp_path / "another.py").write_bytes(b"x")
    after = {path: in_evaluation(digest) for digest, path in sources(folder)}
    assert before.items() <= after.items()


def test_bytes_are_bounded(folder: str) -> None:
    everything = sum(40 + i for i in range(60))
    for most in (1, 500, everything, everything + 1):
        read = sum(int((part != 0).sum()) for part in texts(folder, most))
        assert read == min(most, everything)


def test_standard_library_is_read_and_split() -> None:
    found = sources(standard_library())
    share = sum(in_evaluation(digest) for digest, _ in found) / len(found)
    assert len(found) > 200
    assert share == pytest.approx(0.1, abs=0.05)
    train, evaluation = texts(standard_library(), 4_000_000)
    assert 3_000_000 < len(train) < 4_000_000
    assert len(evaluation) > 150_000
    assert not {part for _, path in found for part in Path(path).parts} & {"test", "tests", "site-packages"}


def test_windows_are_aligned_and_from_the_text() -> None:
    task = create_task("text", n=40, max_bytes=300_000)
    for text, batches in zip(
        texts(standard_library(), 300_000), (task.train_batches(16, 0), task.eval_batches(16)), strict=True
    ):
        source = bytes(text.tolist())
        for batch in islice(batches, 3):
            for tokens, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
                assert tokens[1:] == targets[:-1]
                assert bytes([*tokens, targets[-1]]) in source


def test_training_windows_reach_both_ends(folder: str) -> None:
    text = texts(folder, 200)[0]
    task = Text(n=len(text) - 2, folder=folder, max_bytes=200)
    starts = {tuple(row) for batch in islice(task.train_batches(8, 0), 4) for row in batch.inputs["input_ids"].tolist()}
    assert starts == {tuple(text[:-2].tolist()), tuple(text[1:-1].tolist())}


@pytest.mark.parametrize("eval_windows", [1, 3, 7, 100_000])
def test_evaluation_windows_do_not_overlap(folder: str, eval_windows: int) -> None:
    task = Text(n=10, folder=folder, eval_windows=eval_windows)
    text = texts(folder, task.max_bytes)[1]
    room = (len(text) - 1) // 10
    targets = torch.cat([batch.targets for batch in task.eval_batches(2)])
    assert len(targets) == min(eval_windows, room)
    remaining = text[1:].tolist()
    for row in targets.tolist():
        at = next(s for s in range(0, len(remaining), 10) if remaining[s : s + 10] == row)
        remaining = remaining[at + 10 :]


def test_bits_per_byte() -> None:
    """Uniform: 8. A biased model: minus log2 of what it gave, only where asked, counted in a loop."""
    task = create_task("text")
    batch = next(task.eval_batches(2))
    total, count = task.score(torch.zeros(2, 256, 256), batch.targets)
    assert count == 512
    assert_close(total / count, 8.0)
    logits = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[3, 255, IGNORED, 0, 9], [IGNORED, 7, 7, 1, 200]])
    expected = 0.0
    for row, answers in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, answer in zip(row, answers, strict=True):
            if answer != IGNORED:
                expected -= math.log2(math.exp(scores[answer]) / sum(math.exp(s) for s in scores))
    total, count = task.score(logits, targets)
    assert count == 8
    assert_close(total, expected)


def test_too_little_text(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training files under .* hold \d+ bytes .* windows of n=4000 need 4001"):
        Text(n=4000, folder=folder).train_batches(2, 0)
    with pytest.raises(ValueError, match=r"evaluation files under .* hold \d+ bytes .* windows of n=3000 need 3001"):
        Text(n=3000, folder=folder).eval_batches(2)
    with pytest.raises(ValueError, match=r"hold 0 bytes"):
        Text(folder=str(tmp_path / "nowhere")).train_batches(2, 0)
