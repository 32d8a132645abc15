"""A GGUF file as an ordinary folder: dequantised once into the user's cache, loaded from there ever after.

transformers decodes the file; what it would leave out without a word (rope scaling, tensors that it has no place for,
how a vocabulary cuts text) is looked for here and refused by name.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manyheads.hosts.gguf_checks import check_config, check_splits, check_weights
from manyheads.hosts.gguf_header import Header, read_header
from manyheads.hosts.quiet import quiet
from manyheads.runs.files import cache_folder

# Counts up when what is written changes, so that folders of older releases are made anew.
_LAYOUT = 1
# Seconds after which a person wonders what is going on.
PATIENCE = 2.0
INSTALL = "pip install gguf"


def gguf_folder(path: Path) -> Path:
    """The folder of a GGUF file's model in float32, made if it is not there: config, safetensors, tokenizer, template.

    ValueError where the file cannot be read rightly, OSError where the cache cannot be written; then nothing is left.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{path} is read with the package gguf, which is not installed: type `{INSTALL}`")
    root = cache_folder() / "gguf"
    target = root / _key(path)
    if (target / "config.json").is_file():
        return target
    header = read_header(path)
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with _writing(root):
        lock = FileLock(root / f".{target.name}.lock")
        lock.acquire()
    try:
        if not (target / "config.json").is_file():
            for left in root.glob(f".{target.name}.*.part"):  # of a process that was killed; the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)  # somebody took files out of it
            with _patience(f"{path.name} is decoded once, into {target}"):
                _make(header, target)
    finally:
        lock.release()
    return target


def _key(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", path.stem)[:80].strip(".") or "model"
    return f"{readable}-{path.stat().st_size}-{digest}-{_LAYOUT}"


def _make(header: Header, target: Path) -> None:
    """Written beside its place and then moved there: a folder under the target's name is whole."""
    needed = 4 * header.elements + header.path.stat().st_size // 2
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise _no_room(target.parent, OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free"))
    with quiet():
        model, tokenizer = _decode(header)
    with _writing(target.parent):
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        with _writing(target.parent), quiet():
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            _only_own_tokens(draft, model.config.vocab_size)
            os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _no_room(root, error) from error
    except SafetensorError as error:  # what it raises for a full disk, too
        raise _no_room(root, OSError(errno.EIO, str(error))) from error


def _no_room(root: Path, error: OSError) -> OSError:
    advice = "make room, or set XDG_CACHE_HOME to a folder that can be written"
    return OSError(error.errno, f"the model's cache cannot be written ({error.strerror or error}): {advice}", str(root))


def _decode(header: Header) -> tuple[Any, Any]:
    """Model and tokenizer as transformers decodes them, in plain float32."""
    import torch
    import transformers

    path = header.path
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    place["trust_remote_code"] = False
    try:
        config = transformers.AutoConfig.from_pretrained(**place)
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if kind is None:
            raise ValueError(f"its {header.architecture!r} is no causal language model that transformers knows")
        check_config(header, config)
        with torch.device("meta"):
            plain = kind(config)
        check_weights(header, plain)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        check_splits(header, tokenizer)
        model, told = kind.from_pretrained(**place, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever bytes from outside bring to pass in three packages
        raise ValueError(
            f"{path} cannot be read by transformers {transformers.__version__}: {error}. "
            "Give another conversion of the model, or the folder of its safetensors"
        ) from error
    lacking = sorted(told["missing_keys"] or told["mismatched_keys"] or told["unexpected_keys"])
    if lacking:
        raise ValueError(f"{path} does not fit the model that it announces: {lacking[0]} and {len(lacking) - 1} more")
    return _plain(model, plain), tokenizer


def _only_own_tokens(folder: Path, count: int) -> None:
    """Without the tokens that a tokenizer class adds of its own accord: the model has no row for them."""
    at, settings_at = folder / "tokenizer.json", folder / "tokenizer_config.json"
    words, settings = json.loads(at.read_text()), json.loads(settings_at.read_text())
    foreign = {own["content"] for own in words["added_tokens"] if own["id"] >= count}
    if not foreign:
        return
    words["added_tokens"] = [own for own in words["added_tokens"] if own["id"] < count]
    settings = {key: value for key, value in settings.items() if not (isinstance(value, str) and value in foreign)}
    at.write_text(json.dumps(words, ensure_ascii=False))
    settings_at.write_text(json.dumps(settings, ensure_ascii=False))


def _plain(model: Any, empty: Any) -> Any:
    """The same weights in a model that does not take itself for quantised, and so can be saved."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name in empty.state_dict()}
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    empty.generation_config = model.generation_config
    # The file's title is no place that anything could be loaded from.
    vars(empty.config).pop("_model_name_or_path", None)
    empty.config._name_or_path = ""
    return empty


@contextmanager
def _patience(what: str) -> Iterator[None]:
    """A line on stderr if it takes long, and one more when it is done."""
    begun, told = time.perf_counter(), threading.Event()

    def tell() -> None:
        told.set()
        print(f"{what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if told.is_set():
        print(f"done in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
