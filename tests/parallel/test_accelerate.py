"""Training by accelerate on two processes of a CPU, as its launcher starts them: DistributedDataParallel around a
spread model."""

from pathlib import Path

from forked import ranks, together


def test_two_processes_train_as_one_does() -> None:
    told = ranks(2, ACCELERATE_USE_CPU="true", ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="no")
    both = together(Path(__file__).parent / "accelerated.py", envs=told)
    assert [done.returncode for done in both] == [0, 0], "".join(done.stdout + done.stderr[-2000:] for done in both)
    assert all(done.stdout.count("2 processes, ") == 1 for done in both)
