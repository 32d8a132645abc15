"""What the contract's checks cost where they weigh most: a small call now, and before they came.

    python benchmarks/checks.py                    # softmax, n 16, width 64, against the commit before the checks
    python benchmarks/checks.py --before v0.1.0    # against any other revision

Both versions are loaded into one process, the earlier one from the repository's own history, and called in turns of
twenty with the same weights and tokens. `ratio` is that of the tenth percentiles: what other programs take from a turn
of a millisecond only ever adds to it.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import save

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/checks.py",
    "src/manyheads/finite.py",
    "src/manyheads/softmax.py",
)

BEFORE = "4125bd8~1"  # the last commit that let odd calls through
DIM, HEADS, LENGTH = 64, 4, 16
CALLS, TURNS = 20, 2000
TARGET = 1.02


def earlier(revision: str, folder: Path) -> Path:
    """The sources of a revision."""
    run = subprocess.run(
        ["git", "archive", "--format=tar", revision, "src"], cwd=Path(__file__).parent.parent, capture_output=True
    )
    if run.returncode:
        raise SystemExit(f"no sources of {revision}: {run.stderr.decode().strip()}; want a checkout with its history")
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


def module_from(sources: Path | None) -> Any:
    """softmax of these sources, or of the package as installed; what is imported stays with the module alone."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "manyheads"}
    if sources is not None:
        sys.path.insert(0, str(sources))
    import manyheads

    if sources is not None:
        sys.path.remove(str(sources))
        if not str(manyheads.__file__).startswith(str(sources)):
            raise SystemExit(f"{sources} was not what was imported, but {manyheads.__file__}")
    torch.manual_seed(0)
    made = manyheads.create_attention("softmax", DIM, HEADS, causal=True).eval()
    if sources is not None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "manyheads"]:
            del sys.modules[name]
        sys.modules.update(kept)
    return made


def turn(module: Any, x: torch.Tensor) -> float:
    begun = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return (time.perf_counter() - begun) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE)
    before = parser.parse_args().before
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        now, then = module_from(None), module_from(earlier(before, Path(folder)))
        x = torch.randn(1, LENGTH, DIM)
        torch.testing.assert_close(now(x).output, then(x).output)
        seconds: dict[str, list[float]] = {"now": [], "then": []}
        for i in range(TURNS):
            sides = (("now", now), ("then", then))
            for name, module in sides if i % 2 else reversed(sides):
                seconds[name].append(turn(module, x))
    tenth = {name: sorted(each[TURNS // 20 :])[TURNS // 10] for name, each in seconds.items()}
    row = {
        "what": f"softmax, n {LENGTH}, width {DIM}",
        "before": before,
        "now_us": 1e6 * tenth["now"],
        "before_us": 1e6 * tenth["then"],
        "ratio": tenth["now"] / tenth["then"],
        "target": TARGET,
    }
    save("checks", "cpu", [row])


if __name__ == "__main__":
    main()
