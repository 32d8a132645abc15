"""The results folder: one file per finished cell, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import manyheads
from manyheads.runs.cells import Cell
from manyheads.runs.files import sweep, write_durably
from manyheads.runs.given import read_json
from manyheads.runs.results import SCHEMA

_RESERVE = 256 * 1024  # room for the cell that is being computed when the disk fills up


class Store:
    """`folder/experiment.json` and `folder/cells/KEY.json`. A second run may not use the folder at the same time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.warnings: list[str] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; want a folder for the results")
        self._check_version()
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the results folder {self.folder}: {error.strerror}") from None
        self._lock = self._locked()
        sweep(self._cells)
        try:
            self._reserve.write_bytes(b"\0" * _RESERVE)
        except OSError as error:
            self.close()
            raise _explained(error, self._reserve) from error

    def close(self) -> None:
        with suppress(OSError):
            self._reserve.unlink()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- cells -----------------------------------------------------------------------------------------------------

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """The stored outcome of a cell; None, with a warning where a file is there but cannot be read."""
        path = self._path(cell)
        try:
            held = read_json(path)
            if held["key"] != cell.key or held["schema"] != SCHEMA or not isinstance(held["cell"]["status"], str):
                raise ValueError("it holds something else")
            # The same work may have another label by now; what is stored is the outcome.
            outcome: dict[str, Any] = held["cell"] | cell.row
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.warnings.append(f"{path} cannot be read ({_reason(error)}); this cell is run again")
            return None
        return outcome

    def save(self, cell: Cell, outcome: Mapping[str, Any]) -> None:
        """On a full disk the outcome goes where the reserve was, and OSError says what to do."""
        held = {"schema": SCHEMA, "manyheads": manyheads.__version__, "key": cell.key}
        self._write(self._path(cell), held | {"settings": cell.settings, "cell": outcome})

    def save_experiment(self, experiment: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        held = {"schema": SCHEMA, "manyheads": manyheads.__version__, "created": now(), "environment": environment}
        self._write(self.folder / "experiment.json", held | {"experiment": experiment})

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def _cells(self) -> Path:
        return self.folder / "cells"

    @property
    def _reserve(self) -> Path:
        return self._cells / ".reserve"

    def _path(self, cell: Cell) -> Path:
        return self._cells / f"{cell.key}.json"

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        content = (json.dumps(value, indent=1) + "\n").encode()
        try:
            write_durably(path, content)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with suppress(OSError):
                    self._reserve.unlink()
                    write_durably(path, content)
            raise _explained(error, path) from error

    def _check_version(self) -> None:
        path = self.folder / "experiment.json"
        try:
            held = read_json(path)
            schema, version = held["schema"], held["manyheads"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.warnings.append(f"{path} cannot be read ({_reason(error)}); it is written anew")
            return
        if (schema, version) != (SCHEMA, manyheads.__version__):
            raise ValueError(
                f"{self.folder} was written by manyheads {version} (schema {schema}), this is manyheads "
                f"{manyheads.__version__} (schema {SCHEMA}), and their figures do not mix: choose another --out, "
                "delete the folder, or install the version that wrote it"
            )

    def _locked(self) -> int | None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs at once are merely wasteful, every file is written whole
            return None
        descriptor = os.open(self._cells / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another comparison is running in {self.folder}; wait for it, or choose another --out"
            ) from None
        except OSError:  # a network file system without locks
            os.close(descriptor)
            return None
        return descriptor


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _explained(error: OSError, path: Path) -> OSError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "the disk is full: make room" if full else "see that the folder can be written"
    text = f"{error.strerror} ({cause}, then run the same command again; finished cells are kept)"
    return OSError(error.errno, text, str(path))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
