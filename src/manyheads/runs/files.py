"""Files written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """The whole file or the old one: written beside the target, then put in its place."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        advice = "make room or choose another folder; finished cells are kept"
        raise OSError(error.errno, f"could not write it ({error.strerror}): {advice}", str(path)) from error
    return path


def write_durably(path: Path, content: bytes) -> None:
    """The whole file or the old one, also when the machine loses power."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise
