"""Files and folders written whole or not at all, each by way of a draft beside it: `.NAME.PID.part`.

A process that is killed leaves its draft; the next one that writes there removes it. Whose process lives is
told by its number, and by the lock that it holds on the draft, which machines and containers that share the folder
see too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where there is no asking whether a process lives
    fcntl = None  # type: ignore[assignment]

_DRAFT = re.compile(r"\..+\.(\d{1,10})\.part")
_swept: set[tuple[Path, int]] = set()  # with the process: a fork sweeps for itself
_open: set[Path] = set()


def cache_folder() -> Path:
    """manyheads' folder in the user's cache directory. A relative XDG_CACHE_HOME is ignored, as its standard asks."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "manyheads"
    except RuntimeError as error:
        raise ValueError("there is no home directory to cache in: set XDG_CACHE_HOME to a folder") from error


def check_folder(out: Path) -> None:
    """ValueError where nothing can be written into the folder: said before the work that it is for."""
    above = next(own for own in (out, *out.absolute().parents) if own.exists())
    if not above.is_dir():
        raise ValueError(f"--out {out}{'' if above == out else f': {above}'} is a file: give a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: nothing can be written into {above}: give another folder")


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """The whole file or the old one: written beside the target, then put in its place."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content.encode() if isinstance(content, str) else content, durable=False)
    except OSError as error:
        advice = "make room or choose another folder; finished cells are kept"
        raise OSError(error.errno, f"could not write it ({error.strerror}): {advice}", str(path)) from error
    return path


def write_durably(path: Path, content: bytes) -> None:
    """The whole file or the old one, also when the machine loses power."""
    _write(path, content, durable=True)


def _write(path: Path, content: bytes, *, durable: bool) -> None:
    sweep(path.parent)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    _open.add(draft.absolute())
    try:
        try:
            _put(draft, path, content, durable)
        except FileNotFoundError:  # swept by another machine before the lock was ours
            _put(draft, path, content, durable)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    finally:
        _open.discard(draft.absolute())


def _put(draft: Path, path: Path, content: bytes, durable: bool) -> None:
    with draft.open("wb") as file:
        _locked(file.fileno())
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
        # Still locked: whoever finds the draft without its lock may take it away.
        os.replace(draft, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` once all is there; what was there stays until then.

    A process that is killed leaves its draft and, between two renames, what was there, as `.NAME.PID.before`: the next
    one that writes the same folder removes the former, and puts the latter back."""
    _put_back(path)
    draft, before = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("part", "before"))
    draft.mkdir()
    try:
        with _held(draft), _held(path):
            yield draft
            try:
                if path.exists():
                    os.replace(path, before)
                os.replace(draft, path)
            except BaseException:
                if before.exists() and not path.exists():
                    os.replace(before, path)
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def _put_back(path: Path) -> None:
    """What dead processes left of the folder."""
    left = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,10}})\.(part|before)")
    for found in list(os.scandir(path.parent)):
        named = left.fullmatch(found.name)
        if not named or not found.is_dir(follow_symlinks=False):
            continue
        if int(named[1]) != os.getpid() and _lives(int(named[1])):
            continue
        with suppress(OSError), _held(Path(found.path)) as ours:
            if ours and named[2] == "before" and not path.exists():
                os.replace(found.path, path)
            elif ours:
                shutil.rmtree(found.path, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """While open, nobody takes the folder for one of a dead process. Whether the lock on it is ours."""
    if fcntl is None or not folder.is_dir():
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes the drafts of processes that are dead, once for each folder; of others none."""
    key = (folder.absolute(), os.getpid())
    if fcntl is None or key in _swept:
        return
    _swept.add(key)
    with suppress(OSError):
        for found in list(os.scandir(folder)):
            named = _DRAFT.fullmatch(found.name)
            if named and found.is_file(follow_symlinks=False):
                _remove(Path(found.path).absolute(), int(named[1]))


def _remove(draft: Path, process: int) -> None:
    if draft in _open or (process != os.getpid() and _lives(process)):
        return
    with suppress(OSError):
        descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if _locked(descriptor):
                draft.unlink()
        finally:
            os.close(descriptor)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def _locked(descriptor: int) -> bool:
    """Whether the lock on a file is ours now. A file system without locks gives none."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
