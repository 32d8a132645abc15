"""What a conversion cost, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from manyheads.runs.tables import Column, Entry, bytes_text, count_text, rich_table


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        Column("Model", number=False),
        Column("Bits per token"),
        Column("KL to original"),
        Column("Same token"),
        Column("Hidden keys"),
        Column(f"Cache at {rows[0]['tokens']}"),
        Column("Parameters"),
    ]
    lines = [
        [
            Entry(row["title"]),
            Entry(f"{row['bits_per_token']:.3f}"),
            Entry(f"{row['kl_bits']:.4f}"),
            Entry(f"{row['top_agreement']:.1%}"),
            Entry(f"{row['passkeys']} of {row['keys']}"),
            Entry(bytes_text(row["cache_bytes"])),
            Entry(count_text(row["parameters"])),
        ]
        for row in rows
    ]
    return rich_table(columns, lines, range(len(columns)))
