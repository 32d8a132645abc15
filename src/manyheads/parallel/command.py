"""The command `manyheads plan`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyheads.parallel.plan import Cost, Shape

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# No more processes than this are tried where too few were given.
_MOST = 4096


def plan(
    length: Annotated[str, typer.Option(help="Tokens of the sequence: 16384, 128k, 1M.")] = "1M",
    width: Annotated[int, typer.Option(help="Features of the model.")] = 4096,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    mechanism: Annotated[str, typer.Option(help="A name from `manyheads list` that can be spread.")] = "softmax",
    config: Annotated[str, typer.Option(help="Its arguments as JSON: '{\"kv_heads\": 8}'.")] = "{}",
    processes: Annotated[int, typer.Option(help="How many processes.")] = 8,
    memory: Annotated[str, typer.Option(help="Of a process, for attention: 80GB.")] = "80GB",
    bandwidth: Annotated[str, typer.Option(help="Of a process, in bytes per second: 50GB.")] = "50GB",
    layers: Annotated[int, typer.Option(help="Layers whose tensors are kept for the backward pass.")] = 1,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say which scheme spreads one sequence over processes, and what it costs: bytes sent and held, FLOPs."""
    from manyheads.parallel.plan import costs, shape_of
    from manyheads.runs.given import parse_json, shown

    given = parse_json(config, f"--config {shown(config)}")
    if not isinstance(given, dict):
        raise ValueError(f"--config {shown(config)} is not a JSON object; want one such as '{{\"kv_heads\": 8}}'")
    for what, value in (("processes", processes), ("layers", layers)):
        if not 1 <= value <= _MOST:
            raise ValueError(f"--{what} {value}: want 1 to {_MOST:,}")
    sizes = {"length": number("--length", length), "width": width, "heads": heads, "batch": batch}
    shape = shape_of(mechanism, dtype=dtype, config=given, **sizes)
    room, speed = number("--memory", memory), number("--bandwidth", bandwidth)
    found = [_row(cost, layers, room, speed) for cost in costs(shape, processes)]
    fits = sorted((row for row in found if row["fits"]), key=lambda row: row["sent_forward"] + row["sent_backward"])
    best = fits[0]["scheme"] if fits else None
    enough = processes if fits else _enough(shape, layers, room)
    answer = {
        "mechanism": mechanism, **sizes, "dtype": dtype, "processes": processes, "memory": room, "bandwidth": speed,
        "layers": layers, "best": best, "enough_processes": enough, "schemes": found,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print(answer)


def number(option: str, text: str) -> int:
    """'128k' -> 128000, '80GB' -> 80 * 10^9, '2GiB' -> 2^31."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)(?:B(?:/s)?)?", text.strip())
    if found is None:
        raise ValueError(f"{option} {text!r}: want a number such as 16384, 128k, 1M, 80GB or 80GiB")
    value, unit, binary = found[1], found[2].upper(), found[3]
    factor = 1024 ** list(_UNITS).index(unit) if binary else _UNITS[unit]
    result = round(float(value) * factor)
    if result < 1:
        raise ValueError(f"{option} {text!r}: want at least 1")
    return result


def _row(cost: Cost, layers: int, room: int, speed: int) -> dict[str, Any]:
    held = cost.peak + (layers - 1) * cost.kept
    seconds = layers * (cost.sent_forward + cost.sent_backward) / speed
    return {**asdict(cost), "held": held, "fits": held <= room, "seconds_sending": seconds}


def _enough(shape: Shape, layers: int, room: int) -> int | None:
    """The fewest processes, doubled from one, in which some scheme fits."""
    from manyheads.parallel.plan import costs

    count = 1
    while count <= min(_MOST, shape.length):
        if any(cost.peak + (layers - 1) * cost.kept <= room for cost in costs(shape, count)):
            return count
        count *= 2
    return None


def _print(answer: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from manyheads.runs.tables import bytes_text, count_text, seconds_text

    console, layers = Console(highlight=False, soft_wrap=True), answer["layers"]
    title = f"{answer['mechanism']}, {answer['length']:,} tokens over {answer['processes']} processes, {layers} layers"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    for header in ("scheme", "shards", "sent", "sending", "held", "FLOPs", "busiest", "fits"):
        table.add_column(header, no_wrap=True)
    for row in answer["schemes"]:
        sent = layers * (row["sent_forward"] + row["sent_backward"])
        table.add_row(
            row["scheme"], row["layout"], bytes_text(sent), seconds_text(row["seconds_sending"]),
            bytes_text(row["held"]), count_text(layers * row["flops"]), f"{row['busiest']:.2f}",
            "yes" if row["fits"] else "no",
        )  # fmt: skip
    console.print(table)
    if answer["best"] is not None:
        console.print(f"{answer['best']}: the least is sent among those that fit into {bytes_text(answer['memory'])}.")
    elif answer["enough_processes"] is not None:
        console.print(
            f"None fits into {bytes_text(answer['memory'])}; with {answer['enough_processes']} processes one does."
        )
    else:
        console.print(f"None fits into {bytes_text(answer['memory'])}, with however many processes.")
    console.print(
        "Of one process, the busiest, both passes of attention alone: weights, optimiser and MLPs are not in it."
    )
