"""A converted checkpoint on disk, whole or not at all, with what was done to it and what that cost."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from manyheads.convert.engines import takers
from manyheads.convert.layout import in_eval
from manyheads.convert.report import REPORT, write_report
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.quiet import quiet
from manyheads.mechanism import Mechanism
from manyheads.runs.files import check_folder, whole_folder, write_atomically
from manyheads.runs.given import read_json

RECORD = "conversion.json"
SCHEMA = 1
TOKENIZERS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt",
    "spiece.model", "additional_chat_templates/*",
)  # fmt: skip
_SAMPLE = 48  # tokens whose logits are kept, to see after loading that nothing was lost on the way


def check_target(out: Path, *read: str | Path | None, weights: bool = True) -> None:
    """ValueError where the folder holds something that is no conversion, or what is read: models and texts, by their
    names. weights: whether any are written; where not, a folder that has some keeps the record of these."""
    place = out.resolve()
    for path in (Path(name) for name in read if name is not None and os.path.exists(name)):
        if path.resolve() == place:
            raise ValueError(f"--out {out} is the folder of the model that is converted: give another one")
        if place in path.resolve().parents:
            raise ValueError(f"--out {out} holds {path}, which is read, and would be gone with it: give another one")
    if not weights and any(out.glob("*.safetensors")):
        raise ValueError(
            f"--out {out} holds a converted model, whose record a measurement (--dry-run) would replace: give another "
            "folder"
        )
    check_folder(out)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file() and not _is_sweep(out):
        raise ValueError(f"--out {out} holds files that are no conversion: give a new or an empty folder")


def _is_sweep(out: Path) -> bool:
    """Whether a sweep of ours was stopped in this folder."""
    try:
        held = read_json(out / "experiment.json")["experiment"]
        return bool(held["verb"] == "convert")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_conversion(model: Any, loaded: Loaded, out: Path, record: Mapping[str, Any]) -> None:
    """Writes weights, config, tokenizer and record beside `out`, and then puts the folder in its place."""
    told = sample(model)
    if not all(value < math.inf for value in told["logits"]):
        raise ValueError(
            f"{type(model).__name__} in {model.dtype} gives logits that are no finite numbers, so that nothing is "
            "written: give --dtype bfloat16 or float32"
        )
    with drafted(out, loaded.where) as draft:
        with quiet():
            model.save_pretrained(draft)
            bring_tokenizer(loaded, draft)
        write_record(draft, {**record, "class": type(model).__name__, "sample": told})
        (draft / "README.md").write_text(card(record, type(model).__name__), encoding="utf-8")


@contextmanager
def drafted(out: Path, source: str | None) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place once all is there; what was there stays until then."""
    check_target(out, source)
    out = out.resolve()  # the folder behind a link, and a name for `.`
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(out) as draft:
            yield draft
            _drop_code_elsewhere(draft)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        advice = "make room or choose another folder; the source model is untouched"
        raise OSError(f"{out}: could not write it ({reason}): {advice}") from error


def bring_tokenizer(loaded: Loaded, draft: Path) -> None:
    """Its tokenizer beside a model; the files as they are where we read bytes without it and others need it."""
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(draft)
    elif loaded.where is not None:
        copy_beside(Path(loaded.where), draft, TOKENIZERS)


def copy_beside(source: Path, draft: Path, patterns: Sequence[str]) -> None:
    for file in (found for pattern in patterns for found in source.glob(pattern) if found.is_file()):
        target = draft / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _drop_code_elsewhere(draft: Path) -> None:
    """Takes out of the settings what names Python files that are not here: a source's own code knows nothing of what
    its model became, and with trust_remote_code=True it would be looked for in vain."""
    for path in draft.glob("*config.json"):
        held = json.loads(path.read_text(encoding="utf-8"))
        code = held.get("auto_map") or {}
        names = [each for value in code.values() for each in ([value] if isinstance(value, str) else value)]
        if any(name and not (draft / f"{name.rpartition('.')[0]}.py").is_file() for name in names):
            del held["auto_map"]
            path.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stored_dtype(loaded: Loaded) -> str:
    """What the checkpoint's own files hold, in whatever it was opened: as its settings say, or the files themselves."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    if loaded.where is None:
        return str(loaded.model.dtype).removeprefix("torch.")
    held = AutoConfig.from_pretrained(loaded.where, trust_remote_code=False).dtype
    if held is None:
        held = _floating(Path(str(cached_file(loaded.where, "config.json"))).parent) or loaded.model.dtype
    return str(held).removeprefix("torch.")


def _floating(folder: Path) -> str | None:
    """The type of the first floating-point weight in the folder's files."""
    from safetensors import safe_open

    kinds = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if kind := kinds.get(file.get_slice(key).get_dtype()):
                    return kind
    return None


def narrowed(model: Any, dtype: str) -> Any:
    """The model as it will be once it is opened in this dtype: stock classes keep their rotary angles as they are."""
    wanted = getattr(torch, dtype)
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.to(wanted)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wanted)
    return model


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """The record and, where anything was measured, the same for people."""
    if record["rows"]:
        write_report(record, folder / REPORT)
    return write_atomically(folder / RECORD, json.dumps({"schema": SCHEMA, **record}, indent=1) + "\n")


def sample(model: Any) -> dict[str, Any]:
    """Ids and some logits: those of the last token, at 64 places of the vocabulary."""
    ids = [(7 * i + 3) % model.config.vocab_size for i in range(_SAMPLE)]
    with torch.no_grad(), in_eval(model):
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float().cpu()
    places = torch.linspace(0, len(logits) - 1, 64, dtype=torch.float64).long()
    return {"places": places.tolist(), "logits": logits[places].tolist(), "dtype": str(model.dtype)}


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD}: give a folder that `manyheads convert --out` wrote")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of schema {SCHEMA}: convert again")
    return record


def check_conversion(folder: Path) -> dict[str, Any]:
    """Loads a converted folder and says whether it is what was written: its class, whether transformers alone opens
    it, and the largest difference of the kept logits."""
    record = read_record(folder)
    kept = record.get("sample")
    if kept is None and record.get("files"):
        return _check_files(folder, record)
    if kept is None:
        raise ValueError(f"{folder} holds a measurement without weights (--dry-run)")
    loaded = load_model(folder, dtype=str(kept["dtype"]).removeprefix("torch."))
    again = sample(loaded.model)
    gap = max(abs(a - b) for a, b in zip(again["logits"], kept["logits"], strict=True))
    size = max(abs(a) for a in kept["logits"])
    return {
        "folder": str(folder),
        "class": type(loaded.model).__name__,
        "stock": type(loaded.model).__module__.startswith("transformers."),
        "largest_difference": gap,
        "equal": gap <= 1e-4 * max(1.0, size),
        "dtype": str(kept["dtype"]).removeprefix("torch."),
        "identities": record.get("identities", []),
        "engines": takers(loaded.model),
    }


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a folder that was written file by file, and may not fit into memory: its files' hashes, and a model of its
    configuration without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: Mapping[str, str] = record["files"]
    return {
        "folder": str(folder),
        "class": type(model).__name__,
        "stock": type(model).__module__.startswith("transformers."),
        "largest_difference": None,
        "equal": all((folder / name).is_file() and file_hash(folder / name) == told for name, told in files.items()),
        "dtype": str(config.dtype).removeprefix("torch."),
        "identities": [],
        "engines": takers(model),
    }


def card(record: Mapping[str, Any], kind: str) -> str:
    """A model card of what was done."""
    lines = [
        f"# {record['source']['name']}, converted by manyheads",
        "",
        f"{record['title']}. Class: `{kind}`.",
        "",
    ]
    if record["rows"]:
        lines += ["| | bits per token | KL to the original (bits) | hidden keys |", "|---|---|---|---|"]
    else:
        lines.append("What it cost was not measured: it was converted file by file.")
    for row in record["rows"]:
        figures = f"{row['bits_per_token']:.3f} | {row['kl_bits']:.4f} | {row['passkeys']} of {row['keys']}"
        lines.append(f"| {row['title']} | {figures} |")
    return "\n".join([*lines, "", f"Charts: `{REPORT}`. Every setting and figure: `{RECORD}`.", ""])
