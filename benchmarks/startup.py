"""What `import manyheads` adds to `import torch`, and how long `manyheads list` takes to answer."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import save

MEASURES = (
    "src/manyheads/__init__.py",
    "src/manyheads/__main__.py",
    "src/manyheads/cli.py",
    "src/manyheads/registry.py",
    "src/manyheads/catalogue",
)


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    bare, ours, listing = [], [], []
    for _ in range(7):
        bare.append(seconds(sys.executable, "-c", "import torch"))
        ours.append(seconds(sys.executable, "-c", "import manyheads"))
        listing.append(seconds(sys.executable, "-m", "manyheads", "list"))
    added = statistics.median(b - a for a, b in zip(bare, ours, strict=True))
    rows = [
        {"what": "import torch", "seconds": statistics.median(bare)},
        {"what": "import manyheads adds", "seconds": added, "target": 0.3},
        {"what": "manyheads list", "seconds": statistics.median(listing), "target": 2.5},
    ]
    save("startup", "cpu", rows)


if __name__ == "__main__":
    main()
