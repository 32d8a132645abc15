"""What the cells of a shrink run say: one row per policy and budget, in figures, tables and words.

Nothing is measured here. A failed cell gives no figure; a figure that was not measured is None.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from manyheads.runs.results import Cell, Results, cells_of, done, number
from manyheads.runs.tables import Column, Entry, bytes_text, failure_lines, rich_table, seconds_text
from manyheads.shrink.plan import DENSE

ANSWERED = {"passkey": "Passkey", "needle": "Needle", "recall": "Recall"}
NEAR = 0.95  # of the dense cache's share of right answers
Row = dict[str, Any]


def summarise(results: Results) -> list[Row]:
    """The dense cache first, then every policy and budget."""
    cells = [cell for cell in cells_of(results) if done(cell)]
    rows = [{"title": DENSE, "policy": DENSE, "budget": []}, *(dict(own) for own in results.get("variants", ()))]
    for row in rows:
        own = [cell for cell in cells if cell["mechanism"] == row["title"]]
        row |= _answers(own) | _text(own) | _cost(own, row["title"], cells)
    return rows


def _answers(cells: Sequence[Cell]) -> Row:
    """Mean over lengths, each as many answers as it asked; and the bytes held, of a sequence."""
    row: Row = {}
    for task in ANSWERED:
        own = [cell for cell in cells if cell["task"] == task]
        asked = sum(cell["answers"] for cell in own)
        row[task] = sum(cell["accuracy"] * cell["answers"] for cell in own) / asked if asked else None
        row[f"{task}_answers"] = asked
        row[f"{task}_bytes"] = sum(cell["cache_bytes"] for cell in own) / len(own) if own else None
    return row


def _text(cells: Sequence[Cell]) -> Row:
    own: Mapping[str, Any] = next((cell for cell in cells if cell["task"] == "perplexity"), {})
    keys = ("bits_per_token", "perplexity", "kl_bits", "top_agreement", "greedy_agreement", "greedy_tokens")
    return {key: number(own.get(key)) for key in keys} | {"perplexity_bytes": own.get("cache_bytes")}


def _cost(cells: Sequence[Cell], title: str, every: Sequence[Cell]) -> Row:
    """The dense cache was timed beside every policy: its row has the first of those."""
    names = ("cache_bytes", "prefill_s", "decode_s", "prefill_peak_bytes", "decode_peak_bytes")
    own = [cell for cell in (every if title == DENSE else cells) if cell["task"] == "cost"]
    if not own:
        return dict.fromkeys([*names, *(f"dense_{name}" for name in names), "share", "context"])
    cell = own[0]
    row = {f"dense_{name}": cell[f"dense_{name}"] for name in names}
    row |= {name: cell[f"dense_{name}" if title == DENSE else name] for name in names}
    return row | {"share": row["cache_bytes"] / row["dense_cache_bytes"], "context": cell["n"]}


# -- tables ------------------------------------------------------------------------------------------------------------


def summary_table(results: Results) -> tuple[list[Column], list[list[Entry]]]:
    rows = summarise(results)
    context = next((row["context"] for row in rows if row["context"]), None)
    at = f"at {context:,} tokens" if context else ""
    first = Column("Policy", number=False)
    columns = [(first, [Entry(row["title"], row["title"]) for row in rows])]
    columns.append((Column("Cache", f"bytes held {at}"), [_bytes_entry(row) for row in rows]))
    for task, title in ANSWERED.items():
        if any(row[task] is not None for row in rows):
            note = "share of answers right"
            columns.append((Column(title, note, down=True), [_share_entry(row, task) for row in rows]))
    if any(row["bits_per_token"] is not None for row in rows):
        columns += _text_columns(rows)
    if context:
        columns += [
            _against(rows, "Prefill", f"median, {at}", "prefill_s", seconds_text),
            _against(rows, "Per token", f"median while decoding, {at}", "decode_s", seconds_text),
            _against(rows, "Peak memory", "of the prompt, above the start", "prefill_peak_bytes", bytes_text),
            _against(rows, "Peak, decoding", "above the same start", "decode_peak_bytes", bytes_text),
        ]
    return [column for column, _ in columns], [list(line) for line in zip(*(own for _, own in columns), strict=True)]


def _text_columns(rows: Sequence[Row]) -> list[tuple[Column, list[Entry]]]:
    def bits(row: Row) -> Entry:
        value = row["bits_per_token"]
        if value is None:
            return Entry("–")
        return Entry(f"{value:.3f}", value, (f"{row['perplexity']:.3f}",) if row["perplexity"] else ())

    def plain(key: str, text: Callable[[float], str]) -> list[Entry]:
        return [Entry("–") if row[key] is None else Entry(text(row[key]), row[key]) for row in rows]

    return [
        (Column("Bits per token", "of text; below, perplexity", brief="Bits"), [bits(row) for row in rows]),
        (Column("KL", "bits from the dense cache's next token"), plain("kl_bits", lambda v: f"{v:.4f}")),
        (
            Column("Same greedy text", "share of tokens before the first other one", down=True, brief="Same text"),
            plain("greedy_agreement", _percent),
        ),
    ]


def _against(
    rows: Sequence[Row], title: str, note: str, key: str, text: Callable[[float | None], str]
) -> tuple[Column, list[Entry]]:
    """A figure, and its ratio to the dense cache's that was taken beside it."""
    entries = []
    for row in rows:
        ratio = row[key] / row[f"dense_{key}"] if row[key] is not None and row[f"dense_{key}"] else None
        notes = (f"×{ratio:.3g}",) if ratio is not None and row["title"] != DENSE else ()
        entries.append(Entry(text(row[key]), row[key], notes))
    return Column(title, f"{note}; × is against dense"), entries


def _bytes_entry(row: Row) -> Entry:
    if row["cache_bytes"] is None:
        return Entry("–")
    return Entry(bytes_text(row["cache_bytes"]), row["cache_bytes"], (_percent(row["share"]),))


def _share_entry(row: Row, task: str) -> Entry:
    if row[task] is None:
        return Entry("–")
    return Entry(_percent(row[task]), row[task], (f"of {row[f'{task}_answers']}",))


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def depth_table(results: Results) -> tuple[list[Column], list[list[Entry]]]:
    """Rows: policy and task; a column for every length and depth."""
    cells = [cell for cell in cells_of(results) if done(cell) and cell.get("by_depth")]
    places = list(dict.fromkeys((cell["n"], depth) for cell in cells for depth, _ in cell["by_depth"]))
    places.sort()
    columns = [Column("Policy", number=False), Column("Task", number=False)]
    columns += [Column(f"{n:,}", f"depth {depth:.0%}", down=True) for n, depth in places]
    lines = []
    for title, task in dict.fromkeys((cell["mechanism"], cell["task"]) for cell in cells):
        found = {
            (cell["n"], depth): share
            for cell in cells
            if (cell["mechanism"], cell["task"]) == (title, task)
            for depth, share in cell["by_depth"]
        }
        shares = [found.get(place) for place in places]
        entries = [Entry("–") if own is None else Entry(_percent(own), own) for own in shares]
        lines.append([Entry(title, title), Entry(task, task), *entries])
    return columns, lines


# -- words -------------------------------------------------------------------------------------------------------------


def headline(results: Results) -> list[str]:
    """What each policy saved and what it cost; where there are many, the smallest cache that kept each quality."""
    dense, *rows = summarise(results)
    if not rows:
        return ["Nothing was shrunk, so there is no answer yet."]
    if len(rows) <= 4:
        lines = [_sentence(row, dense) for row in rows]
    else:
        lines = [line for task in ANSWERED if (line := _smallest(rows, dense, task))]
        lines += _closest(rows)
    failed = sum(not done(cell) for cell in cells_of(results))
    if failed:
        lines.append(f"{failed} of {len(cells_of(results))} cells failed: see the failures.")
    return lines


def _sentence(row: Row, dense: Row) -> str:
    parts = []
    if row["share"] is not None:
        held, whole = bytes_text(row["cache_bytes"]), bytes_text(row["dense_cache_bytes"])
        parts.append(f"{_percent(row['share'])} of the dense cache's bytes ({held} of {whole})")
    for task, title in ANSWERED.items():
        if row[task] is not None and dense[task] is not None:
            parts.append(f"{title.lower()} {_percent(dense[task])} → {_percent(row[task])}")
    if row["bits_per_token"] is not None and dense["bits_per_token"] is not None:
        parts.append(f"bits per token {dense['bits_per_token']:.3f} → {row['bits_per_token']:.3f}")
    if row["decode_s"] is not None:
        parts.append(f"a token takes ×{row['decode_s'] / row['dense_decode_s']:.2f} the dense cache's time")
    return f"{row['title']}: {'; '.join(parts) or 'no figures'}."


def _smallest(rows: Sequence[Row], dense: Row, task: str) -> str:
    if not dense[task]:
        return ""
    good = [row for row in rows if row[task] is not None and row[task] >= NEAR * dense[task] and row[f"{task}_bytes"]]
    goal = f"{NEAR:.0%} of the dense cache's {ANSWERED[task].lower()} answers ({_percent(dense[task])} right)"
    if not good:
        return f"No policy here keeps {goal}."
    best = min(good, key=lambda row: row[f"{task}_bytes"])
    share = best[f"{task}_bytes"] / dense[f"{task}_bytes"]
    return f"Smallest cache that keeps {goal}: {best['title']}, with {_percent(share)} of the bytes."


def _closest(rows: Sequence[Row]) -> list[str]:
    """Next tokens closest to the dense cache's, among those that hold at most a quarter."""
    small = [row for row in rows if row["kl_bits"] is not None and (row["share"] or 1) <= 0.27]
    if not small:
        return []
    best = min(small, key=lambda row: row["kl_bits"])
    return [
        f"Closest to the dense cache's next tokens with about a quarter of its bytes or less: {best['title']}, "
        f"{best['kl_bits']:.4f} bits away."
    ]


def print_summary(results: Results) -> None:
    """Quality in one table, costs in another, so that both fit a hundred columns; then words and failures."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    columns, lines = summary_table(results)
    brief = [[_in_one(entry) for entry in line] for line in lines]
    costs = next((place for place, column in enumerate(columns) if column.title == "Prefill"), len(columns))
    console.print(rich_table(columns, brief, range(costs)))
    if costs < len(columns):
        console.print(rich_table(columns, brief, [0, *range(costs, len(columns))]))
    for sentence in headline(results):
        console.print(Text(sentence))
    for line in failure_lines(results):
        console.print(Text(line, style="red"), no_wrap=True, overflow="ellipsis")


def _in_one(entry: Entry) -> Entry:
    """With the ratio or share that stands below it on the page."""
    shown = [note for note in entry.notes if note.endswith("%") or note.startswith("×")]
    return Entry(" ".join([entry.text, *(f"({note})" for note in shown)]), bad=entry.bad)
