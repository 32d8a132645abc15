"""Reports below a folder: which there are, and one of them by its name in that list."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("report.html", "explain.html", "study.html")
MOST_FOLDERS, MOST_REPORTS, DEEPEST = 5_000, 500, 8


@dataclass(frozen=True)
class Report:
    name: str
    kind: str
    bytes: int
    modified: float

    def told(self) -> dict[str, Any]:
        return asdict(self)


def list_reports(root: Path) -> list[Report]:
    """The newest first. Links are not followed, neither to files nor to folders, and hidden folders are left out."""
    found: list[Report] = []
    for folders, (folder, below, files) in enumerate(os.walk(root, followlinks=False)):
        place = Path(folder)
        depth = len(place.relative_to(root).parts)
        below[:] = [] if depth >= DEEPEST or folders > MOST_FOLDERS else sorted(b for b in below if b[0] != ".")
        for name in sorted(set(files) & set(NAMES)):
            # What has just gone, or has a name that cannot be told, is not there.
            with suppress(OSError, UnicodeEncodeError):
                own = (place / name).lstat()
                label = (place / name).relative_to(root).as_posix()
                label.encode()
                if stat.S_ISREG(own.st_mode):
                    found.append(Report(label, _kind(name, files), own.st_size, own.st_mtime))
    return sorted(found, key=lambda report: -report.modified)[:MOST_REPORTS]


def _kind(name: str, beside: list[str]) -> str:
    if name != "report.html":
        return name.removesuffix(".html")
    return "compare" if "results.json" in beside else "shrink" if "report.json" in beside else "report"


def open_report(root: Path, name: str) -> BinaryIO:
    """FileNotFoundError for whatever is not in the list, so that a name can only ever be one of those."""
    if name not in {report.name for report in list_reports(root)}:
        raise FileNotFoundError(name)
    return os.fdopen(os.open(root / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
