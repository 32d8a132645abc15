"""One conversion from beginning to end: identities, what it costs, healing beside a control healed alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.methods import Method, prove
from manyheads.convert.saving import check_target, narrowed, save_conversion, stored_dtype, write_record
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions
from manyheads.runs.environment import environment
from manyheads.runs.steps import Progress

ORIGINAL, CONTROL = "original", "control, healed"


class Damaged(ValueError):
    """The damage is above what was allowed; nothing was written."""


@dataclass(frozen=True)
class Plan:
    """values: of the method's knob, one conversion each. tokens: of calibration. max_damage: bits per token.
    dtype: of the files that are written; the source's without it."""

    values: tuple[int, ...]
    sizes: Sizes
    tokens: int = 8192
    healing: Healing | None = None
    max_damage: float | None = None
    dtype: str | None = None


def run_conversion(
    loaded: Loaded,
    method: Method,
    plan: Plan,
    measured_on: Questions,
    trained_on: Questions,
    out: Path,
    *,
    write: bool = True,
) -> dict[str, Any]:
    """Converts, measures, heals and writes; returns the record. write: False measures and writes no weights."""
    check_target(out, loaded.where)
    if write and len(plan.values) != 1:
        given = ",".join(map(str, plan.values))
        raise ValueError(f"{method.knob} {given}: several are measured with --dry-run only")
    for value in plan.values:
        method.check(loaded.model, value)
    progress = Progress()
    judge = Judge(loaded, measured_on, plan.sizes)
    rows = calibration_rows(trained_on, plan.tokens, min(plan.sizes.length, plan.tokens)) if method.calibrated else []
    identities = prove(method, loaded.model, plan.values, rows)
    lines = [_line(judge, loaded.model, ORIGINAL, progress)]
    made = loaded.model
    for value in plan.values:
        made = method.make(loaded.model, value, rows)
        lines.append(_line(judge, made, method.title(value), progress))
        if plan.healing is not None:
            made = _healed(made, plan.healing, trained_on, out, f"healing-{method.name}-{value}", progress)
            lines.append(_line(judge, made, f"{method.title(value)}, healed", progress))
    cost = lines[-1]["bits_per_token"] - lines[0]["bits_per_token"]
    if plan.healing is not None:
        control = _healed(copy.deepcopy(loaded.model), plan.healing, trained_on, out, "healing-control", progress)
        lines.append(_line(judge, control, CONTROL, progress))
        del control
    record = {**_record(loaded, method, plan, lines), "identities": identities}
    if plan.max_damage is not None and cost > plan.max_damage:
        raise Damaged(f"{cost:.3f} bits per token lost, more than --max-damage {plan.max_damage}: nothing is written")
    if write:
        save_conversion(narrowed(made, plan.dtype or stored_dtype(loaded)), loaded, out, record)
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, record)
    return record


def _line(judge: Judge, model: Any, title: str, progress: Progress) -> dict[str, Any]:
    with progress.measure(title) as tell:
        figures = judge.measure(model, tell)
    return {"title": title, **figures}


def _healed(model: Any, plan: Healing, questions: Questions, out: Path, name: str, progress: Progress) -> Any:
    keep = out.with_name(f".{out.name}.{name}")
    keep.parent.mkdir(parents=True, exist_ok=True)
    with progress.measure(name.replace("-", " ")) as tell:
        return heal(model, questions, plan, keep=keep, tell=tell)


def _record(loaded: Loaded, method: Method, plan: Plan, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": "; ".join(method.title(value) for value in plan.values),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": asdict(fingerprint(loaded.model, loaded.name)),
        "method": method.name,
        "settings": {**asdict(plan), **asdict(method)},  # type: ignore[call-overload]
        "rows": list(lines),
        "environment": environment(),
    }
