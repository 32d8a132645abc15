"""Training as `accelerate launch` has two processes of a CPU do it: DistributedDataParallel around a spread model."""

from pathlib import Path

from forked import ranks, together


def test_accelerate_launch() -> None:
    """With what the launcher tells the processes that it starts."""
    told = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    both = together(Path(__file__).parent / "accelerated.py", envs=ranks(2, **told))
    assert [done.returncode for done in both] == [0, 0], "".join(done.stdout + done.stderr[-2000:] for done in both)
    assert "".join(done.stdout for done in both).count("2 processes, ") == 2
