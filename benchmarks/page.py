"""The page of measured figures, made from the results: `python benchmarks/page.py > docs/measured.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import leads

from manyheads.compare.train import unpassed
from manyheads.registry import list_attentions

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def measured_page() -> str:
    parts = ["# What was measured", "", *_lead()]
    for title, name, words, table in (
        ("Recall", "recall", leads.RECALL, _quality),
        ("Digits", "digits", leads.DIGITS, _quality),
        ("Windows and the whole image", "canvases", leads.CANVASES, _canvases),
        ("Edges and sets", "relations", leads.RELATIONS, _relations),
        ("Maps and edges: time and memory", "vision", leads.VISION, _vision),
        ("The field's benchmarks", "field", leads.FIELD, _field),
        ("Time over the length", "linear", leads.LENGTH, _linear),
        ("Against other packages", "peers", leads.PEERS, _peers),
        ("A real model with a smaller cache", "real", leads.REAL, _real),
        ("Commands on a real model", "commands", leads.COMMANDS, _commands),
        ("Published claims, repeated", "studies", leads.STUDIES, _studies),
        ("Conversions", "convert", leads.CONVERT, _convert),
        ("Backbones made cheaper", "backbones", leads.BACKBONES, _backbones),
        ("What conversions take", "convert_speeds", leads.CONVERT_SPEEDS, _convert_speeds),
        ("Conversions file by file", "convert_stream", leads.CONVERT_STREAM, _convert_stream),
        ("A small model that reads pictures", "vlm", leads.VLM, _vlm),
        ("The same model, steered", "steer", leads.STEER, _steer),
        ("Fewer image tokens: time and bytes", "thinning", leads.THINNING, _thinning),
        ("Fewer image tokens: answers", "thinning_answers", leads.THINNING_ANSWERS, _thinned),
        ("Interventions while a model draws", "steer_diffusion", leads.DRAWING, _drawing),
        ("The same while a UNet draws", "steer_diffusion_unet", leads.DRAWING_UNET, _drawing),
        ("A model that draws taught two new things", "personalise", leads.PERSONAL, _personal),
        ("The same taught to a UNet", "personalise_unet", leads.PERSONAL_UNET, _personal),
        ("Pairs like speech and its text", "speech", leads.SPEECH, _speech),
    ):
        if not (RESULTS / f"{name}.json").is_file():
            parts += ["", f"## {title}", "", words, "", "*Not measured yet.*"]
            continue
        results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        rows = results["rows"]
        words += _unpassed() if table is _quality else ""
        parts += ["", f"## {title}", "", words, "", *table(rows), "", _where(results["environment"], rows)]
    return "\n".join(parts) + "\n"


def _unpassed() -> str:
    """Whose figures would be of something else."""
    names = [name for name in list_attentions() if unpassed(name)]
    return f" Not measured, as they read more than their tokens and no task has it: {', '.join(names)}."


def _lead() -> list[str]:
    return [
        "Figures of `benchmarks/`, each with the environment it came from; this page is generated from the files under",
        "`benchmarks/results/`. The other results there are named in [the benchmarks](../benchmarks/README.md).",
    ]


def _quality(rows: list[Row]) -> list[str]:
    longer = any("longer" in row for row in rows)
    head = ["mechanism", "as", "parameters", "accuracy", *(["in five times the steps"] if longer else [])]
    body = []
    for row in rows:
        cells = [row["mechanism"], row["pattern"], f"{row['parameters']:,}" if row["parameters"] else "", _percent(row)]
        if longer:
            cells.append(_percent(row, "longer") if "longer" in row else "")
        body.append(cells)
    return _table(head, body)


def _canvases(rows: list[Row]) -> list[str]:
    head = ["mechanism", "sees in a layer", "parameters", "accuracy", "error", "seeds", "seconds"]
    body = []
    for row in sorted(rows, key=lambda row: -(row["accuracy"] or 0.0)):
        cells = [row["mechanism"], row.get("sees", ""), f"{row['parameters']:,}" if row["parameters"] else ""]
        if row["accuracy"] is not None:
            measured = [f"{100 * row['accuracy_error']:.1f}", str(row["seeds"]), f"{row['seconds']:.0f}"]
            body.append([*cells, _percent(row), *measured])
        else:
            body.append([*cells, _percent(row), "", "", ""])
    return _table(head, body)


def _relations(rows: list[Row]) -> list[str]:
    head = ["task", "mechanism", "sees in a layer", "parameters", "right", "error", "seeds", "seconds"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    body = []
    for row in sorted(rows, key=lambda row: (tasks.index(row["task"]), -(row["value"] or 0.0))):
        cells = [row["task"], row["mechanism"], row["sees"]]
        if row["value"] is None:
            body.append([*cells, "", _percent(row, "value"), "", "", ""])
            continue
        measured = [f"{100 * row['value_error']:.1f}", str(row["seeds"]), f"{row['seconds']:.0f}"]
        body.append([*cells, f"{row['parameters']:,}", _percent(row, "value"), *measured])
    return _table(head, body)


def _vision(rows: list[Row]) -> list[str]:
    words = {"windows": "time, of dense attention's", "by hand": "time, of torch's own convolutions'"}
    words |= {"exponent over cells": "time grows with cells to the power of", "sampling": "seconds for 1,000,000 edges"}
    words |= {"graph": "milliseconds for 100,000 edges", "graph peer": "time, of torch_geometric's"}
    words |= {"graph memory": "memory, of the same", "graph by hand": "time, of message passing's by hand"}
    of = {"windows": "ratio", "by hand": "ratio", "exponent over cells": "exponent", "sampling": "seconds"}
    of |= {"graph": "ms", "graph peer": "ratio", "graph memory": "ratio", "graph by hand": "ratio"}
    own = ("window", "dilation", "block", "halo")
    body = []
    for row in rows:
        given = ",".join(f"{key}={row[key]}" for key in own if key in row)
        name = row.get("mechanism", row.get("by", "")) + (f"[{given}]" if given else "")
        figure, target = row[of[row["what"]]], row.get("target")
        asked = "" if target is None else f"{target:g}"
        body.append([name, words[row["what"]], f"{figure:.3g}", asked])
    return _table(["mechanism", "what", "measured", "target, at most"], body)


def _field(rows: list[Row]) -> list[str]:
    """A table for each part, a line per mechanism, best first at the first column."""
    lines: list[str] = []
    for part, words in leads.PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        columns = list(dict.fromkeys(row["column"] for row in own))
        found: dict[str, dict[str, Row]] = {}
        for row in own:
            found.setdefault(row["mechanism"], {})[row["column"]] = row
        names = sorted(found, key=lambda name: _rank(found[name].get(columns[0])))
        body = [[name, *(_field_cell(found[name].get(column)) for column in columns)] for name in names]
        lines += ["", words, "", *_table(["mechanism", *columns], body)]
        lines += [f"- {sentence}" for sentence in _at_chance(own, columns)]
        lines += [f"- {sentence}" for sentence in _unscored(own)]
    return lines[1:]


def _rank(row: Row | None) -> tuple[bool, float]:
    if row is None or row["value"] is None:
        return True, 0.0
    return False, -row["value"] if row["higher_is_better"] else row["value"]


def _field_cell(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "" if row is None else "cannot"
    share = row["metric"] in ("accuracy", "whole answers right")
    scale, form = (100, ".1f") if share else (1, "+.2f" if row["metric"] == "index" else ".3f")
    text = format(scale * row["value"], form) + "%" * share
    if row.get("seeds", 1) > 1:
        text += f" ± {format(scale * row['value_error'], form.removeprefix('+'))}"
    held = f" ({row['state_bytes'] / 1024:.1f} KiB)" if row["part"] == "recall" and "state_bytes" in row else ""
    return text + held + "*" * (not row.get("in_time", True))


def _at_chance(rows: list[Row], columns: list[str]) -> list[str]:
    """Columns in which nobody is better than the trivial answer by two errors."""
    said = []
    for column in columns:
        own = [row for row in rows if row["column"] == column and row["value"] is not None and "trivial" in row]
        if own and not any(_better(row) for row in own):
            said.append(f"{column}: nobody learnt it in these steps; the trivial answer has {own[0]['trivial']:.3f}")
    return said


def _better(row: Row) -> bool:
    gain = row["value"] - row["trivial"] if row["higher_is_better"] else row["trivial"] - row["value"]
    return bool(gain > 2 * (row["value_error"] or 0.0))


def _unscored(rows: list[Row]) -> list[str]:
    """Whoever has no score, once for each reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["value"] is None:
            reasons.setdefault(row["error"], {})[row["mechanism"]] = None
    return [f"cannot: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _studies(rows: list[Row]) -> list[str]:
    words = {True: "seen", False: "not seen", None: "not decided"}
    head = ["study", "paper", "model", "seeds", "claim", "what it rests on"]
    body = (
        [
            row["study"],
            row["reference"],
            row["model"],
            str(row["seeds"]),
            words[row["seen"]],
            " ".join(row["lines"]).replace("|", "/"),
        ]
        for row in rows
    )
    return _table(head, body)


def _percent(row: Row, key: str = "accuracy") -> str:
    return row.get("error", "not run") if row[key] is None else f"{100 * row[key]:.1f}%"


def _linear(rows: list[Row]) -> list[str]:
    lengths = [key for key in rows[0] if key.startswith("ms_")]
    head = ["mechanism", "time", "exponent", *(f"n {key[3:]}" for key in lengths), "decode"]
    return _table(
        head,
        (
            [
                row["mechanism"],
                row["time"],
                f"{row['exponent']:.2f}",
                *(f"{row[key]:.1f}" for key in lengths),
                f"{row['decode_ratio']:.2f}" if "decode_ratio" in row else "",
            ]
            for row in rows
        ),
    )


def _peers(rows: list[Row]) -> list[str]:
    """A line per mechanism, peer and length, both passes side by side; then what could not be timed."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "ratio" in row:
            lines.setdefault((row["mechanism"], row["peer"], row["n"]), dict(row))[row["pass"]] = row
    table = _table(
        ["mechanism", "peer", "n", "forward", "with backward", "difference"],
        (
            [mechanism, peer, n, _ratio(line, "forward"), _ratio(line, "forward+backward"), _difference(line)]
            for (mechanism, peer, n), line in lines.items()
        ),
    )
    absent = [f"- {row['mechanism']}, {row['peer']}: {row['left_out']}" for row in rows if "left_out" in row]
    return [*table, "", "Known and not timed:", "", *absent] if absent else table


def _real(rows: list[Row]) -> list[str]:
    head = ["context", "cache", "a token", "ms", "prompt", "bytes", "KL, bits", "bits per token", "keys found"]
    return _table(
        head,
        (
            [
                row["context"],
                row["cache"],
                f"{row['ratio']:.2f}" + (f" ± {row['ratio_error']:.2f}" if "ratio_error" in row else ""),
                f"{row['ms_per_token']:.0f}",
                f"{row['prefill_ratio']:.2f}",
                f"{row['bytes_ratio']:.2f}",
                f"{row['kl_bits']:.3f}",
                f"{row['bits']:.2f}",
                f"{row['passkeys']} of {row['keys']}" if row["keys"] else "not asked",
            ]
            for row in sorted(rows, key=lambda row: int(row["context"]))
        ),
    )


def _commands(rows: list[Row]) -> list[str]:
    head = ["typed", "seconds", "at most", "of all cores", "first word", "time left as said, over true"]
    return _table(
        head,
        (
            [
                f"{row['command']}: `{row['typed']}`",
                f"{row['seconds']:.0f}",
                f"{row['target']:.0f}",
                f"{row['cpu_s']:.0f}",
                "none" if row["first_s"] is None else f"{row['first_s']:.1f}",
                "none said" if row["guess"] is None else f"{row['guess']:.2f}",
            ]
            for row in rows
        ),
    )


def _ratio(line: Row, name: str) -> str:
    return f"{line[name]['ratio']:.2f}" if name in line else ""


def _difference(line: Row) -> str:
    equal = f"{line['equal']:.0e}" if "equal" in line else "shapes alone compared"
    return f"{equal}; {line['differs']}" if "differs" in line else equal


def _table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


HEALED = ", healed"


def _convert(rows: list[Row]) -> list[str]:
    of: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "conversion" in row:
            of.setdefault((row["model"], row["conversion"]), []).append(row)
    head = ["model", "conversion", "numbers of cache", "seeds", "bits", "KL", "hidden keys", "bits, healed",
            "keys, healed", "tokens, seeds"]  # fmt: skip
    body = []
    for (model, title), line in of.items():
        if title.endswith(HEALED):
            continue
        healed = of.get((model, title + HEALED), [])
        told = [f"{_mean(healed, 'bits_per_token'):.3f}", f"{_mean(healed, 'passkeys'):.0%}",
                f"{healed[0]['healed']:,}, {len(healed)}"] if healed else ["", "", ""]  # fmt: skip
        body.append(
            [model, title, f"{line[0]['cache']:,}", len(line), f"{_mean(line, 'bits_per_token'):.3f}",
             f"{_mean(line, 'kl_bits'):.3f}", f"{_mean(line, 'passkeys'):.0%}", *told]
        )  # fmt: skip
    claims = [row for row in rows if "claim" in row]
    return _table(head, body) + ([""] if claims else []) + [
        f"- {row['model']}, {row['claim']}: {'shows' if row['shows'] else 'does not show'} "
        f"({'; '.join(' < '.join(f'{each:.3f}' for each in seed) for seed in row['of_seeds'])})"
        for row in claims
    ]  # fmt: skip


def _mean(rows: list[Row], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def _backbones(rows: list[Row]) -> list[str]:
    of: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        of.setdefault((row["part"], row["way"]), []).append(row)
    body = []
    for (part, way), line in of.items():
        times = ", ".join(
            f"{what}: {sum(row['time_of'][what] for row in line) / len(line):.2f}" for what in line[0]["time_of"]
        )
        text = [f"{_mean(line, key):.3f}" if key in line[0] else "" for key in ("bits_per_token", "kl_bits")]
        right = f"{_mean(line, 'passkeys' if 'passkeys' in line[0] else 'right'):.0%}"
        stored = f"{_mean(line, 'weight_bytes'):.2f}" if "weight_bytes" in line[0] else ""
        body.append([part, way, len(line), *text, right, f"{line[0]['parameters']:,}", stored, times])
    head = ["part", "what", "seeds", "bits", "KL", "keys or digits", "parameters", "bytes of weights", "time"]
    return _table(head, body)


def _convert_speeds(rows: list[Row]) -> list[str]:
    kinds = {kind: [row for row in rows if row["measured"] == kind] for kind in ("transfer", "decode", "step", "shift")}
    lines = [
        f"- {row['model']}: transfer {row['ratio']:.2f} times the tokens a second of full healing"
        + (f" ({row['ratio_of_new_rows']:.2f} on rows that are new)" if "ratio_of_new_rows" in row else "")
        for row in kinds["transfer"]
    ]
    lines += [
        f"- {row['model']}, a token behind {row['context']:,}, {row['way']}: {row['ratio_to_before']:.2f} of before"
        + (f", {row['ratio_to_gqa']:.2f} of the heads of as many bytes" if "ratio_to_gqa" in row else "")
        for row in kinds["decode"]
    ]
    for name in dict.fromkeys(row["name"] for row in kinds["step"]):
        own = [row for row in kinds["step"] if row["name"] == name]
        told = ", ".join(f"{row['context']:,}: {row['ms'] / own[0]['ms']:.2f}" for row in own)
        lines.append(f"- a layer's step, {name}, times the first, behind {told}")
    first = next(iter(kinds["shift"]), None)
    return lines + [
        f"- a linear layer by {row['way']}: {row['ms'] / first['ms']:.2f} of the time, "
        f"{row['weight_bytes'] / first['weight_bytes']:.2f} of the bytes"
        for row in kinds["shift"][1:] if first is not None
    ]  # fmt: skip


def _convert_stream(rows: list[Row]) -> list[str]:
    return _table(
        ["model", "conversion", "time", "peak above an empty process, files", "targets"],
        (
            [row["model"], row["conversion"], f"{row['time_ratio_to_load_and_save']:.2f}",
             f"{row['peak_over_overhead']:.2f}", {True: "met", False: "not met", None: ""}[row.get("met")]]
            for row in rows
        ),
    )  # fmt: skip


def _vlm(rows: list[Row]) -> list[str]:
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        told = f"{100 * row['right']:.0f}%"
        told += f" ({100 * row['hallucinated']:.0f}% of absent ones)" if "hallucinated" in row else ""
        kinds.setdefault(row["what"], {})[str(row["noise"])] = told
    noises = list(dict.fromkeys(str(row["noise"]) for row in rows))
    head = ["right", *(noise if noise.startswith("no ") else f"noise {noise}" for noise in noises)]
    return _table(head, ([what, *(of.get(noise, "") for noise in noises)] for what, of in kinds.items()))


def _steer(rows: list[Row]) -> list[str]:
    asked = [row for row in rows if "told_apart" in row]
    shares = ("hallucinated", "seen", "right")
    table = _table(
        ["intervention", *shares, "told apart", "claim"],
        (
            [
                row["method"],
                *(f"{100 * row[key]:.0f}%" for key in shares),
                f"{row['told_apart']:.2f}",
                row.get("claim", ""),
            ]
            for row in asked
        ),
    )
    boxes = [
        f"Attention on a box under `{row['method']}`: {100 * row['before']:.1f}% before, {100 * row['after']:.1f}% "
        f"after, mean of {row['pictures']} pictures."
        for row in rows
        if "before" in row
    ]
    steps = [f"- {row['what']} with {row['method']}: {row['ratio']:.2f}" for row in rows if "ratio" in row]
    return [*table, "", *boxes, "", *steps]


def _thinning(rows: list[Row]) -> list[str]:
    return _table(
        ["what leaves", "prompt", "bytes held", "a token"],
        (
            [row["way"], f"{row['prefill_ratio']:.2f}", f"{row['held_share']:.2f}", f"{row['decode_ratio']:.2f}"]
            for row in rows
        ),
    )


def _thinned(rows: list[Row]) -> list[str]:
    kinds = [key for key in rows[0] if key not in ("way", "image_tokens", "held_share")]
    return _table(
        ["way", "image tokens", "bytes held", *kinds],
        (
            [
                row["way"],
                *(f"{row[key]:.2f}" for key in ("image_tokens", "held_share")),
                *(_percent(row, kind) for kind in kinds),
            ]
            for row in rows
        ),
    )


def _drawing(rows: list[Row]) -> list[str]:
    said = {True: "shows", False: "does not show", None: ""}
    return _table(
        ["claim", "measure", "wanted", "without", "with", "standard error", ""],
        (
            [
                *(row[key] for key in ("claim", "measure", "wanted")),
                *(f"{row[key]:.2f}" for key in ("without", "with", "standard_error")),
                said[row["shows"]],
            ]
            for row in rows
        ),
    )


def _personal(rows: list[Row]) -> list[str]:
    return _table(
        ["form", "claim", "measure", "wanted", "plain", "with", "standard error", ""],
        (
            [
                *(row[key] for key in ("group", "claim", "measure", "wanted")),
                *(f"{row[key]:.3f}" for key in ("plain", "with", "standard_error")),
                "shows" if row["shows"] else "does not show",
            ]
            for row in rows
        ),
    )


def _speech(rows: list[Row]) -> list[str]:
    depths, batches = ([row for row in rows if row["part"] == part] for part in ("depth", "batches"))
    told = _table(
        ["encoder layers", "decoder layers", "parameters", "right", "greedy tokens per second", "times the first"],
        (
            [row["encoder"], row["decoder"], f"{row['parameters']:,}", f"{row['right']:.1%}",
             f"{row['decoded_per_second']:,.0f}", f"{row['times_the_first']:.2f}"]
            for row in depths
        ),
    )  # fmt: skip
    return [*told, "", *_table(
        ["buckets of", "batch sizes", "padding of frames", "padding of tokens", "tokens per second", "times the fixed"],
        (
            [row["buckets"], ", ".join(map(str, row["sizes"])), f"{row['padding_frames']:.1%}",
             f"{row['padding_tokens']:.1%}", f"{row['tokens_per_second']:,.0f}", f"{row['times_the_fixed']:.2f}"]
            for row in batches
        ),
    )]  # fmt: skip


def _where(environment: Row, rows: list[Row]) -> str:
    """Where it was measured, and where parts that were run by themselves."""
    own = (environment["commit"], environment["cpu"])
    others = dict.fromkeys((row["commit"], row["cpu"]) for row in rows if "commit" in row)
    others.pop(own, None)
    parts = [commit + ("" if cpu == own[1] else f" on {cpu}") for commit, cpu in others]
    told = f"commit {own[0]}" + (f", other parts {', '.join(parts)}" if parts else "")
    return (
        f"*{environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads, torch "
        f"{environment['torch']}, {told}.*"
    )


if __name__ == "__main__":
    print(measured_page(), end="")
