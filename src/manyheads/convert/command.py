"""The command `manyheads convert`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyheads.convert.healing import Healing
    from manyheads.convert.methods import Method
    from manyheads.hosts.loading import Loaded
    from manyheads.hosts.questions import Questions

METHODS = ("gqa", "mla", "prune", "shiftadd")
_KNOBS = {"gqa": "kv-heads", "mla": "rank", "prune": "heads", "shiftadd": "bits"}
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
# The share of a text that is measured on; the rest is for calibration and healing.
_MEASURED = 0.2


def convert(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="A folder, hub name, .gguf file or smollm2; or: check DIR. Else the packaged model."),
    ] = None,
    to: Annotated[
        str, typer.Option(help=f"{', '.join(METHODS)}, or a mechanism: hedgehog, 'mswa[window=64]'.")
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
    heads: Annotated[
        str | None, typer.Option(help="prune: query heads that stay in all; several with --dry-run. Half without it.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="prune: importance, ablation, or random.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="shiftadd: bits of a weight, several with --dry-run. 5 without it.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="A mechanism's layers: 4-20, or 0,2,4. All without it.")] = None,
    transfer: Annotated[
        int | None, typer.Option(help="A mechanism's steps of learning from the attention that it replaces.")
    ] = None,
    transfer_loss: Annotated[
        str | None,
        typer.Option(help="What is learnt: output of the layer, or heads or weights with the host's frozen."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="A mechanism's window: tokens that stay softmax's.")] = None,
    active: Annotated[float | None, typer.Option(help="A mixture's share of heads that are on: 0.75.")] = None,
    budget_bytes: Annotated[int | None, typer.Option(help="Bytes of cache per token, in place of the above.")] = None,
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
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: want one of {', '.join(DTYPES)}")
    for name, value, most in (("--windows", windows, 4096), ("--keys", keys, 4096), ("--calibrate", calibrate, 10**7)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} {value}: want 1 to {most}")
    if not 64 <= length <= 1 << 20:
        raise ValueError(f"--length {length}: want 64 tokens or more")
    from manyheads.convert.damage import Sizes
    from manyheads.convert.run import Damaged, Plan, run_conversion
    from manyheads.convert.saving import check_target

    check_target(out)
    settings = {"gqa": {"align": align}, "mla": {"norm": norm}, "prune": {"by": by}, "shiftadd": {}}
    knobs = {"gqa": kv_heads, "mla": rank, "prune": heads, "shiftadd": bits}
    beside = {
        "layers": layers, "transfer": transfer, "transfer-loss": transfer_loss, "window": window, "active": active,
    }  # fmt: skip
    spec = _spec(to, settings, knobs, beside)
    knob = knobs.get(to)
    values = None if knob is None else parse_counts(f"--{_KNOBS[to]}", knob)
    if values and budget_bytes is not None:
        raise ValueError(f"--{_KNOBS[to]} and --budget-bytes both say how far to go: give one of them")
    from manyheads.hosts.loading import load_model

    loaded = load_model(given[0] if given else None, dtype=dtype)
    method = _method(to, settings, spec, loaded, beside)
    if spec is not None and budget_bytes is None:
        values = (len(method.layers),)  # type: ignore[attr-defined]
    if method.usual is not None and budget_bytes is None:
        values = values or (method.usual,)
    values = values or (_within(method, loaded, budget_bytes),)
    measured, trained = _texts(loaded, text)
    sizes = Sizes(windows, length, keys, length)
    plan = Plan(values, sizes, calibrate, _healing(loaded, heal, lr, length), max_damage)
    try:
        record = run_conversion(loaded, method, plan, measured, trained, out, write=not dry_run)
    except Damaged as error:
        typer.echo(f"manyheads: {error}", err=True)
        raise typer.Exit(3) from None
    return _tell(record, out, dry_run, as_json)


def _spec(
    to: str,
    own: dict[str, dict[str, str | None]],
    knobs: dict[str, str | None],
    beside: dict[str, Any],
) -> dict[str, Any] | None:
    """The mechanism that `to` names, None where it is a method; ValueError for options of another one."""
    from manyheads.registry import list_attentions
    from manyheads.runs.names import parse_name

    for other, settings in own.items():
        strange = [f"--{key}" for key, value in settings.items() if value is not None]
        strange += [f"--{_KNOBS[other]}"] if knobs[other] is not None else []
        if other != to and strange:
            raise ValueError(f"{strange[0]} belongs to --to {other}, and --to {to} was given")
    if to in METHODS:
        for name, value in beside.items():
            if value is not None:
                raise ValueError(f"--{name} belongs to a mechanism, and --to {to} was given")
        return None
    named = parse_name(to)
    spec: dict[str, Any] = {"name": named} if isinstance(named, str) else named
    if spec["name"] not in list_attentions():
        raise ValueError(f"--to {to!r}: want {', '.join(METHODS)}, or a mechanism (`manyheads list`)")
    if not 0 <= (beside["transfer"] or 0) <= 10**7:
        raise ValueError(f"--transfer {beside['transfer']}: want a number of steps, 0 or more")
    if beside["transfer-loss"] is not None and not beside["transfer"]:
        raise ValueError("--transfer-loss says what is learnt: give --transfer STEPS with it")
    return spec


def _method(
    to: str,
    own: dict[str, dict[str, str | None]],
    spec: dict[str, Any] | None,
    loaded: Loaded,
    beside: dict[str, Any],
) -> Method:
    from manyheads.convert.cases import case_spec, default_loss
    from manyheads.convert.methods import METHODS as KNOWN
    from manyheads.convert.methods import Hosted

    if spec is None:
        return KNOWN[to](**{key: value for key, value in own[to].items() if value is not None})
    heads, count = loaded.config.num_attention_heads, loaded.config.num_hidden_layers
    spec = case_spec(spec, heads, window=beside["window"], active=beside["active"])
    loss = beside["transfer-loss"] or default_loss(spec)
    return Hosted(spec, parse_layers(beside["layers"], count), beside["transfer"] or 0, loss)


def parse_layers(text: str | None, count: int) -> tuple[int, ...]:
    """'4-6,9' -> 4, 5, 6, 9."""
    if text is None:
        return tuple(range(count))
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text):
        raise ValueError(f"--layers {text!r}: want layers such as 4-20, or 0,2,4")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise ValueError(f"--layers {text!r}: no layer lies in it; want layers such as 4-20")
    return tuple(sorted(found))


def _within(method: Method, loaded: Loaded, size: int | None) -> int:
    """The knob's value for so many bytes of cache per token; for half of what the model has, without them."""
    from manyheads.convert.layout import cache_numbers

    whole = cache_numbers(loaded.model)
    each = next(loaded.model.parameters()).element_size()
    return method.within(loaded.model, whole // 2 if size is None else size // each)


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise ValueError(f"{name} {text!r}: want a number, or several such as 4,2,1 with --dry-run")
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
    from manyheads.hosts.questions import Questions, library_text
    from manyheads.runs.given import read_text

    if path is None:
        return Questions(loaded), Questions(loaded, text=library_text(), where="the library", seed=1)
    content = read_text(path, what="--text")
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
