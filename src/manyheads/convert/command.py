"""The command `manyheads convert`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads.runs.options import Scheduler

METHODS = ("gqa", "mla", "prune", "distil", "bam", "shiftadd")
DTYPES = ("float32", "bfloat16", "float16")


def convert(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="A folder, hub name, .gguf file or smollm2 (bam: several); or: check DIR. Else the packaged model."
        ),
    ] = None,
    to: Annotated[
        str, typer.Option(help=f"{', '.join(METHODS)}, or a mechanism: hedgehog, 'mswa\\[window=64]'.")
    ] = "gqa",
    kv_heads: Annotated[
        str | None, typer.Option(help="gqa: key/value heads; several with --dry-run: 4,2,1. A half without it.")
    ] = None,
    align: Annotated[str | None, typer.Option(help="gqa: procrustes, mean, first, or random.")] = None,
    rank: Annotated[
        str | None, typer.Option(help="mla: numbers of the latent, several with --dry-run. Half the cache without it.")
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="mla: exact (one more channel, transformers only) or fitted (any engine; heal it)."),
    ] = None,
    rope_dim: Annotated[
        int | None, typer.Option(help="mla: numbers of the shared rotary key; a head's without it.")
    ] = None,
    fold: Annotated[str | None, typer.Option(help="mla: neighbouring frequencies in one (FreqFold), or auto.")] = None,
    format: Annotated[
        str | None, typer.Option(help="mla: deepseek_v3, youtu, or manyheads (decodes from the latents).")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="prune: query heads that stay in all; several with --dry-run. Half without it.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="prune: importance, normalised, ablation, alone, greedy, random; or dimap, of an image model."
        ),
    ] = None,
    uniform: Annotated[
        bool | None,
        typer.Option(
            "--uniform/--global", help="prune: as many in every layer, or all layers compete (class of ours)."
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="prune, an image model: share of weights set to zero by dimap. 0.5 without --heads."),
    ] = None,
    depth: Annotated[
        str | None, typer.Option(help="distil: layers of the student; several with --dry-run. Half without it.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="distil: width of the student, whose weights are then new.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A teacher for --to distil or --healing distil; the model itself without it.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="shiftadd: bits of a weight, several with --dry-run. 5 without it.")
    ] = None,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="shiftadd: MLPs of shifts beside those of products, and a router.")
    ] = False,
    share_kv: Annotated[
        bool, typer.Option("--share-kv", help="bam: one set of keys and values, the mean of all models'.")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="A mechanism's layers: 4-20, or 0,2,4. All without it.")] = None,
    transfer: Annotated[
        int | None,
        typer.Option(help="A mechanism's steps of learning from the attention that it replaces; a student's."),
    ] = None,
    transfer_loss: Annotated[
        str | None,
        typer.Option(help="What is learnt: output of the layer, or heads or weights with the host's frozen."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="A mechanism's window: tokens that stay softmax's.")] = None,
    active: Annotated[
        float | None,
        typer.Option(help="A mixture's share of heads that are on: 0.75. bam: MLPs for a token, 2 without it."),
    ] = None,
    budget_bytes: Annotated[int | None, typer.Option(help="Bytes of cache per token, in place of the above.")] = None,
    calibrate: Annotated[int, typer.Option(help="Tokens of calibration.")] = 8192,
    heal: Annotated[str | None, typer.Option(help="Tokens to heal with: 200k, 1M. None without it.")] = None,
    healing: Annotated[
        str | None, typer.Option(help="How to heal: full, lora (adapters, merged), or distil (from a teacher).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of healing; by the model's size without it.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text to calibrate, heal and measure on.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text to measure on.")] = 8,
    keys: Annotated[int, typer.Option(help="Hidden keys to ask for.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of a window, and of a haystack.")] = 512,
    max_damage: Annotated[float | None, typer.Option(help="Bits per token that may be lost; exit 3 above.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write no weights.")] = False,
    scheduler: Scheduler = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}. Without it: float32, and written as it came.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="File by file, unmeasured: gqa by mean or first, prune by --scores.")
    ] = False,
    scores: Annotated[Path | None, typer.Option(help="--stream, prune: JSON, per layer a number per head.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and what it cost.")] = Path("converted"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Change a checkpoint's attention, and tell what that cost. `convert check DIR` opens what was written."""
    given = list(models or [])
    if given[:1] == ["check"]:
        return _check(given[1:], as_json)
    if len(given) > 1 and to != "bam":
        raise ValueError(f"{len(given)} models given ({', '.join(given)}); --to {to} takes one")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: want one of {', '.join(DTYPES)}")
    for name, value, most in (("--windows", windows, 4096), ("--keys", keys, 4096), ("--calibrate", calibrate, 10**7)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} {value}: want 1 to {most}")
    if not 64 <= length <= 1 << 20:
        raise ValueError(f"--length {length}: want 64 tokens or more")
    from manyheads.convert.asked import Asked, run_asked, stream_asked
    from manyheads.convert.damage import Sizes
    from manyheads.convert.ranks import is_first
    from manyheads.convert.run import Damaged

    own: dict[str, dict[str, Any]] = {
        "gqa": {"align": align},
        "mla": {"norm": norm, "rope_dim": rope_dim, "fold": parse_fold(fold), "format": format},
        "prune": {"by": by, "uniform": uniform, "sparsity": sparsity},
        "distil": {"width": width},
        "shiftadd": {"mixture": mixture or None},
        "bam": {"sources": tuple(given[1:]) or None, "share_kv": share_kv or None},
    }
    asked = Asked(
        to,
        own,
        {"gqa": kv_heads, "mla": rank, "prune": heads, "distil": depth, "shiftadd": bits},
        {"layers": layers, "transfer": transfer, "transfer-loss": transfer_loss, "window": window, "active": active},
        {"heal": heal, "healing": healing, "lr": lr, "against": against},
        Sizes(windows, length, keys, length),
        budget_bytes=budget_bytes,
        calibrate=calibrate,
        max_damage=max_damage,
        dtype=dtype,
    )
    if stream:
        strange = {"--dry-run": dry_run or None, "--text": text, "--scheduler": scheduler}
        return _tell_streamed(stream_asked(asked, given, scores, strange, out), out, as_json)
    if scores is not None:
        raise ValueError("--scores belongs to --stream: without it, --by says how heads are scored")
    try:
        record = run_asked(asked, given, text, out, write=not dry_run, scheduler=scheduler)
    except Damaged as error:
        typer.echo(f"manyheads: {error}", err=True)
        raise typer.Exit(3) from None
    return _tell(record, out, dry_run, as_json) if is_first() else None


def parse_fold(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not re.fullmatch(r"\d{1,6}", text):
        raise ValueError(f"--fold {text!r}: want a number of frequencies, or auto")
    return int(text)


def _check(folders: list[str], as_json: bool) -> None:
    from manyheads.convert.pictures import check_images
    from manyheads.convert.saving import check_conversion, read_record

    if len(folders) != 1:
        raise ValueError("convert check takes one folder: manyheads convert check DIR")
    folder = Path(folders[0])
    record = read_record(folder)
    found = check_images(folder, record) if "images" in record else check_conversion(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        who = "transformers opens it with no code of ours" if found["stock"] else "opens with `import manyheads`"
        same = "equal to what was written" if found["equal"] else "NOT what was written"
        gap = found["largest_difference"]
        how = "by its files' hashes" if gap is None else f"{gap:.2g}"
        typer.echo(f"{found['folder']}: {found['class']}, {found['dtype']}; {who}; {same} ({how})")
        for held in found["identities"]:
            typer.echo(f"  held before it was written: {held['claim']} ({held['gap']:.2g} of the largest logit)")
        for engine, answer in found["engines"].items():
            typer.echo(f"  {engine}: {answer}")
    if not found["equal"]:
        raise typer.Exit(1)


def _tell(record: dict[str, Any], out: Path, dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "weights": not dry_run, "rows": record["rows"]}, indent=2))
        return
    from rich.console import Console

    from manyheads.convert.pictures import table as of_images
    from manyheads.convert.table import table
    from manyheads.runs.tables import rich_table

    console = Console()
    rows = record["rows"]
    console.print(rich_table(*of_images(rows), range(7)) if "images" in record else table(rows))
    if "images" in record:
        console.print(f"on {record['images']['count']} of {record['images']['what']}", markup=False)
    console.print(f"{'measured' if dry_run else 'written'}: {out}", markup=False)


def _tell_streamed(record: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "weights": True, "rows": []}, indent=2))
    else:
        typer.echo(f"written: {out}; {record['title']}, not measured; `manyheads convert check {out}`")
