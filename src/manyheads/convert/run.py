"""One conversion from beginning to end: identities, what it costs, healing beside a control healed alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.method import Method, prove
from manyheads.convert.report import AFTER, CONTROL, HEALED, ORIGINAL, TAUGHT
from manyheads.convert.saving import check_target, save_conversion, stored_dtype, write_record
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions
from manyheads.runs.environment import environment
from manyheads.runs.steps import Progress


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

    def __post_init__(self) -> None:
        if self.max_damage is not None and not 0 <= self.max_damage < math.inf:
            raise ValueError(f"--max-damage {self.max_damage}: want bits per token, 0 or more")


def run_conversion(
    loaded: Loaded,
    method: Method,
    plan: Plan,
    measured_on: Questions,
    trained_on: Questions,
    out: Path,
    *,
    write: bool = True,
    teacher: Any = None,
) -> dict[str, Any]:
    """Converts, measures, heals and writes; returns the record. write: False measures and writes no weights. teacher:
    a model for the forms of healing that have one; the source without it."""
    check_target(out, loaded.where)
    if write and len(plan.values) != 1:
        given = ",".join(map(str, plan.values))
        raise ValueError(f"{method.knob} {given}: several are measured with --dry-run only")
    method.check_loaded(loaded)
    for value in plan.values:
        method.check(loaded.model, value)
    progress = Progress()
    judge = Judge(loaded, measured_on, plan.sizes)
    rows = calibration_rows(trained_on, plan.tokens, min(plan.sizes.length, plan.tokens)) if method.calibrated else []
    identities = prove(method, loaded.model, plan.values, rows)

    def train(model: Any, training: Healing, by: Any, name: str) -> Any:
        keep = out.with_name(f".{out.name}.{name.replace(' ', '-')}")
        keep.parent.mkdir(parents=True, exist_ok=True)
        of = loaded.model if by is None else by
        with progress.measure(name) as tell:
            return heal(model, trained_on, training, teacher=of, keep=keep, tell=tell)

    lines = [_line(judge, loaded.model, "original", ORIGINAL, None, progress)]
    made = loaded.model
    for value in plan.values:
        made = method.make(loaded.model, value, rows)
        lines.append(_line(judge, made, method.title(value), AFTER, value, progress))
        for stage, training, by in ((TAUGHT, method.lesson, None), (HEALED, plan.healing, teacher)):
            if training is not None:
                made = train(made, training, by, f"{stage} {method.name} {value}")
                lines.append(_line(judge, made, f"{method.title(value)}, {stage}", stage, value, progress))
        if write:
            _allow(plan, lines, "nothing is written")
    control = method.control(loaded.model, plan.values[-1], plan.healing)
    if control is not None:
        title, model, training = control
        lines.append(_line(judge, train(model, training, teacher, "healing control"), title, CONTROL, None, progress))
        del control, model
    record = {**_record(loaded, method, plan, lines), "identities": identities}
    if write:
        save_conversion(
            made.to(getattr(torch, plan.dtype) if plan.dtype else stored_dtype(loaded)), loaded, out, record
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, record)
        _allow(plan, lines, f"what was measured is in {out}")
    return record


def _allow(plan: Plan, lines: Sequence[dict[str, Any]], then: str) -> None:
    """Damaged where a value's last line lost too much. What is no number is too much."""
    if plan.max_damage is None:
        return
    for line in {line["value"]: line for line in lines[1:] if line["value"] is not None}.values():
        cost = line["bits_per_token"] - lines[0]["bits_per_token"]
        if not cost <= plan.max_damage:
            given = f"more than --max-damage {plan.max_damage}"
            raise Damaged(f"{line['title']}: {cost:.3f} bits per token lost, {given}: {then}")


def _line(judge: Judge, model: Any, title: str, stage: str, value: int | None, progress: Progress) -> dict[str, Any]:
    with progress.measure(title) as tell:
        figures = judge.measure(model, tell)
    return {"title": title, "stage": stage, "value": value, **figures}


def _record(loaded: Loaded, method: Method, plan: Plan, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": "; ".join(method.title(value) for value in plan.values),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": asdict(fingerprint(loaded.model, loaded.name)),
        "method": method.name,
        "knob": method.knob,
        "settings": {**asdict(plan), **method.settings},
        "rows": list(lines),
        "environment": environment(),
    }
