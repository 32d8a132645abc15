"""Training under `accelerate launch` on two processes of a CPU: DistributedDataParallel around a spread model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_ip 127.0.0.1 --main_process_port 0"
)


@pytest.mark.slow  # two processes of its own, each of which imports torch and transformers
def test_accelerate_launch() -> None:
    here = Path(__file__).parent
    told = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *WORDS.split(), str(here / "accelerated.py")],
        capture_output=True, text=True, env=os.environ | told, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("2 processes, ") == 2
