"""One conversion from beginning to end: identities, what it costs, healing beside a control healed alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.grouped import aligned, cache_numbers, check_kv_heads, grouped
from manyheads.convert.healing import Healing, heal
from manyheads.convert.saving import check_target, save_conversion, write_record
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions
from manyheads.runs.environment import environment
from manyheads.runs.steps import Progress

# Largest difference of logits that rounding makes, as a share of the largest logit.
EXACT = 2e-3
ORIGINAL, CONTROL = "original", "control, healed"


class Damaged(ValueError):
    """The damage is above what was allowed; nothing was written."""


@dataclass(frozen=True)
class Plan:
    """kv_heads: one conversion each. tokens: of calibration."""

    kv_heads: tuple[int, ...]
    sizes: Sizes
    align: str = "procrustes"
    tokens: int = 8192
    healing: Healing | None = None
    max_damage: float | None = None


def convert_grouped(
    loaded: Loaded, plan: Plan, measured_on: Questions, trained_on: Questions, out: Path, *, write: bool = True
) -> dict[str, Any]:
    """Converts, measures, heals and writes; returns the record. write: False measures and writes no weights."""
    check_target(out)
    if write and len(plan.kv_heads) != 1:
        raise ValueError(f"--kv-heads {','.join(map(str, plan.kv_heads))}: several are measured with --dry-run only")
    for count in plan.kv_heads:
        check_kv_heads(loaded.model, count)
    progress = Progress()
    judge = Judge(loaded, measured_on, plan.sizes)
    length = min(plan.sizes.length, plan.tokens)
    calibration = calibration_rows(trained_on, plan.tokens, length) if plan.align == "procrustes" else []
    prove(loaded.model, plan, calibration)
    rows = [_row(judge, loaded.model, ORIGINAL, progress)]
    made = loaded.model
    for count in plan.kv_heads:
        made = grouped(loaded.model, count, align=plan.align, calibration=calibration)
        title = f"gqa {count}, {plan.align}"
        rows.append(_row(judge, made, title, progress))
        if plan.healing is not None:
            made = _healed(made, plan.healing, trained_on, out, f"healing-{count}", progress)
            rows.append(_row(judge, made, f"{title}, healed", progress))
    if plan.healing is not None:
        control = _healed(copy.deepcopy(loaded.model), plan.healing, trained_on, out, "healing-control", progress)
        rows.append(_row(judge, control, CONTROL, progress))
        del control
    record = _record(loaded, plan, rows)
    cost = rows[-2 if plan.healing else -1]["bits_per_token"] - rows[0]["bits_per_token"]
    if plan.max_damage is not None and cost > plan.max_damage:
        raise Damaged(f"{cost:.3f} bits per token lost, more than --max-damage {plan.max_damage}: nothing is written")
    if write:
        save_conversion(made, loaded, out, record)
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, record)
    return record


def prove(model: Any, plan: Plan, calibration: Sequence[Sequence[int]]) -> None:
    """The exact identities of the conversion, on this model; RuntimeError where one fails, which is a bug of ours."""
    layers = max(1, model.config.num_key_value_heads)
    row = torch.tensor([[(7 * i + 3) % model.config.vocab_size for i in range(64)]], device=model.device)
    same = {"as many heads as before": lambda: grouped(model, layers, align="mean")}
    if plan.align == "procrustes":
        same["turned heads, not yet pooled"] = lambda: aligned(model, min(plan.kv_heads), calibration)
    with torch.no_grad():
        before = model(row, use_cache=False).logits
        for name, make in same.items():
            gap = float((make()(row, use_cache=False).logits - before).abs().max() / before.abs().max())
            if not gap < EXACT * (1 if model.dtype == torch.float32 else 50):
                raise RuntimeError(
                    f"{name} should leave {type(model).__name__} as it was, and changes its logits by {gap:.2g} of the "
                    "largest: a bug of manyheads; nothing was written, please report it"
                )


def _row(judge: Judge, model: Any, title: str, progress: Progress) -> dict[str, Any]:
    with progress.measure(title) as tell:
        figures = judge.measure(model, tell)
    size = next(model.parameters()).element_size()
    return {"title": title, **figures, "cache_bytes_per_token": cache_numbers(model) * size}


def _healed(model: Any, plan: Healing, questions: Questions, out: Path, name: str, progress: Progress) -> Any:
    keep = out.with_name(f".{out.name}.{name}")
    with progress.measure(name.replace("-", " ")) as tell:
        return heal(model, questions, plan, keep=keep, tell=tell)


def _record(loaded: Loaded, plan: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = ", ".join(map(str, plan.kv_heads))
    return {
        "title": f"Key/value heads pooled from {loaded.config.num_key_value_heads} to {counts} ({plan.align})",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": asdict(fingerprint(loaded.model, loaded.name)),
        "method": "gqa",
        "settings": asdict(plan),
        "rows": list(rows),
        "environment": environment(),
    }
