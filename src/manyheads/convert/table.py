"""What a conversion cost, as a table for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from manyheads.runs.tables import Column, Entry, bytes_text, count_text, rich_table, seconds_text

# Places of the table that a terminal has room for.
_BRIEF = (0, 1, 2, 5, 6, 7, 9, 11)


def damage_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[list[Entry]]]:
    columns = [
        Column("Model", number=False),
        Column("Bits per token", "held-out text", brief="Bits"),
        Column("KL to original", "bits", brief="KL"),
        Column("Same token", "both find it likeliest", down=True),
        Column("Same greedy text", "before the first other token", down=True),
        Column("Hidden keys", "told", down=True, brief="Keys"),
        Column("Needles", "named numbers told", down=True),
        Column("Cache", f"at {rows[0]['tokens']} tokens"),
        Column("Cache per token", "what one more adds"),
        Column("Parameters", brief="Weights"),
        Column("Prefill", "of the original's time"),
        Column("Decode", "of the original's time per token", brief="Time"),
    ]
    return columns, [_line(row) for row in rows]


def _line(row: Mapping[str, Any]) -> list[Entry]:
    return [
        Entry(row["title"], row["title"]),
        Entry(f"{row['bits_per_token']:.3f}", row["bits_per_token"]),
        Entry(f"{row['kl_bits']:.4f}", row["kl_bits"]),
        Entry(f"{row['top_agreement']:.1%}", row["top_agreement"]),
        Entry(f"{row['greedy_agreement']:.0%}", row["greedy_agreement"]),
        Entry(f"{row['passkeys']} of {row['keys']}", row["passkeys"]),
        Entry(f"{row['needles']} of {row['keys']}", row["needles"]),
        Entry(bytes_text(row["cache_bytes"]), row["cache_bytes"]),
        Entry(bytes_text(row["cache_bytes_per_token"]), row["cache_bytes_per_token"]),
        Entry(count_text(row["parameters"]), row["parameters"]),
        Entry(f"{row['prefill_ratio']:.2f}", row["prefill_ratio"], (seconds_text(row["prefill_s"]),)),
        Entry(f"{row['decode_ratio']:.2f}", row["decode_ratio"], (seconds_text(row["decode_s"]),)),
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return rich_table(*damage_table(rows), _BRIEF)
