"""The command `manyheads convert`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyheads.convert.healing import Healing
    from manyheads.hosts.loading import Loaded
    from manyheads.hosts.questions import Questions

METHODS = ("gqa",)
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
# The share of a text that is measured on; the rest is for calibration and healing.
_MEASURED = 0.2


def convert(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="A folder, hub name, .gguf file or smollm2; or: check DIR. Else the packaged model."),
    ] = None,
    to: Annotated[str, typer.Option(help=f"What to convert to: {', '.join(METHODS)}.")] = "gqa",
    kv_heads: Annotated[str, typer.Option(help="Key/value heads; several with --dry-run: 4,2,1.")] = "1",
    align: Annotated[str, typer.Option(help="procrustes, mean, first, or random.")] = "procrustes",
    calibrate: Annotated[int, typer.Option(help="Tokens of calibration.")] = 8192,
    heal: Annotated[str | None, typer.Option(help="Tokens to heal with: 200k, 1M. None without it.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of healing; by the model's size without it.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text to calibrate, heal and measure on.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text to measure on.")] = 8,
    keys: Annotated[int, typer.Option(help="Hidden keys to ask for.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of a window, and of a haystack.")] = 512,
    max_damage: Annotated[float | None, typer.Option(help="Bits per token that may be lost; exit 3 above.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write no weights.")] = False,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and what it cost.")] = Path("converted"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Change a checkpoint's attention, and tell what that cost. `convert check DIR` opens what was written."""
    given = list(models or [])
    if given[:1] == ["check"]:
        return _check(given[1:], as_json)
    if len(given) > 1:
        raise ValueError(f"{len(given)} models given ({', '.join(given)}); --to {to} takes one")
    if to not in METHODS:
        raise ValueError(f"--to {to!r}: want {' or '.join(METHODS)}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: want one of {', '.join(DTYPES)}")
    for name, value, most in (("--windows", windows, 4096), ("--keys", keys, 4096), ("--calibrate", calibrate, 10**7)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} {value}: want 1 to {most}")
    if not 64 <= length <= 1 << 20:
        raise ValueError(f"--length {length}: want 64 tokens or more")
    from manyheads.convert.damage import Sizes
    from manyheads.convert.run import Damaged, Plan, convert_grouped
    from manyheads.convert.saving import check_target

    check_target(out)
    counts = parse_counts(kv_heads)
    from manyheads.hosts.loading import load_model

    loaded = load_model(given[0] if given else None, dtype=dtype)
    measured, trained = _texts(loaded, text)
    sizes = Sizes(windows, length, keys, length)
    plan = Plan(counts, sizes, align, calibrate, _healing(loaded, heal, lr, length), max_damage)
    try:
        record = convert_grouped(loaded, plan, measured, trained, out, write=not dry_run)
    except Damaged as error:
        typer.echo(f"manyheads: {error}", err=True)
        raise typer.Exit(3) from None
    return _tell(record, out, dry_run, as_json)


def parse_counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise ValueError(f"--kv-heads {text!r}: want a number, or several such as 4,2,1 with --dry-run")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def parse_tokens(text: str) -> int:
    """'200k' -> 200000."""
    match = re.fullmatch(r"(\d{1,12})([kMG]?)", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"--heal {text!r}: want a number of tokens such as 200k or 1M")
    return int(match[1]) * _UNITS[match[2]]


def _healing(loaded: Loaded, tokens: str | None, lr: float | None, length: int) -> Healing | None:
    from manyheads.convert.healing import Healing

    if tokens is None:
        return None
    if lr is not None and not 0 < lr < 1:
        raise ValueError(f"--lr {lr}: want a number between 0 and 1")
    size = sum(p.numel() for p in loaded.model.parameters())
    rate = lr if lr is not None else 1e-3 if size < 1e7 else 1e-4
    return Healing(parse_tokens(tokens), rate, length)


def _texts(loaded: Loaded, path: Path | None) -> tuple[Questions, Questions]:
    """Questions on what is measured, and on what may be learnt from."""
    from manyheads.hosts.probes import read_text
    from manyheads.hosts.questions import Questions, library_text

    if path is None:
        return Questions(loaded), Questions(loaded, text=library_text(), where="the library", seed=1)
    content = read_text(path)
    cut = round(len(content) * (1 - _MEASURED))
    where = f"--text {path}"
    return Questions(loaded, text=content[cut:], where=where), Questions(
        loaded, text=content[:cut], where=where, seed=1
    )


def _check(folders: list[str], as_json: bool) -> None:
    from manyheads.convert.saving import check_conversion

    if len(folders) != 1:
        raise ValueError("convert check takes one folder: manyheads convert check DIR")
    found = check_conversion(Path(folders[0]))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        who = "transformers opens it with no code of ours" if found["stock"] else "opens with `import manyheads`"
        same = "equal to what was written" if found["equal"] else "NOT what was written"
        typer.echo(f"{found['folder']}: {found['class']}; {who}; {same} ({found['largest_difference']:.2g})")
    if not found["equal"]:
        raise typer.Exit(1)


def _tell(record: dict[str, Any], out: Path, dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "weights": not dry_run, "rows": record["rows"]}, indent=2))
        return
    from rich.console import Console

    from manyheads.convert.table import table

    console = Console()
    console.print(table(record["rows"]))
    console.print(f"{'measured' if dry_run else 'written'}: {out}", markup=False)
