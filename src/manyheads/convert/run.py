"""One conversion from beginning to end: identities, what it costs, healing beside a control healed alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.keeping import forget
from manyheads.convert.method import Method, Rows, prove
from manyheads.convert.ranks import is_first
from manyheads.convert.report import AFTER, CONTROL, HEALED, ORIGINAL, TAUGHT
from manyheads.convert.saving import check_target, narrowed, save_conversion, stored_dtype, write_record
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions
from manyheads.runs.environment import environment
from manyheads.runs.steps import Progress, Tell


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


def run_conversion(made: Conversion, out: Path, *, write: bool = True) -> dict[str, Any]:
    """Converts, measures, heals and writes; returns the record. write: False measures and writes no weights."""
    loaded, method, plan = made.loaded, made.method, made.plan
    check_target(out, loaded.where, weights=write)
    stored_as = plan.dtype or stored_dtype(loaded)
    if write:
        method.check_stored(stored_as)
    if write and len(plan.values) != 1:
        given = ",".join(map(str, plan.values))
        raise ValueError(f"{method.knob} {given}: several are measured with --dry-run only")
    identities = prove(method, loaded.model, plan.values, made.rows)
    run = made.begin(out)
    try:
        converted = _convert(run, made, write)
        record = {**made_record(made, run.lines), "identities": identities}
        if not is_first():
            allow(plan, run.lines, "nothing is written")
        elif write:
            stored = narrowed(method.settled(converted), stored_as)
            save_conversion(stored, loaded, out, record)
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_record(out, record)
            allow(plan, run.lines, f"what was measured is in {out}")
    except Damaged:
        run.forget()
        raise
    run.forget()
    return record


class Conversion:
    """A method on a model, with what it is measured and taught on; ValueError where it does not fit.

    others: models beside the source on which the result depends."""

    def __init__(
        self,
        loaded: Loaded,
        method: Method,
        plan: Plan,
        measured_on: Questions,
        trained_on: Questions,
        teacher: Any = None,
        others: Sequence[Any] = (),
    ) -> None:
        method.check_loaded(loaded)
        for value in plan.values:
            method.check(loaded.model, value)
        self.loaded, self.method, self.plan, self.teacher = loaded, method, plan, teacher
        self.measured_on, self.trained_on = measured_on, trained_on
        self.models = [loaded.model, *([] if teacher is None else [teacher]), *others]
        self.judge = Judge(loaded, measured_on, plan.sizes)
        length = min(plan.sizes.length, plan.tokens)
        self.rows: Rows = calibration_rows(trained_on, plan.tokens, length) if method.calibrated else []

    @property
    def settings(self) -> dict[str, Any]:
        return {**asdict(self.plan), **self.method.settings}

    def begin(self, out: Path) -> _Run:
        return _Run(self.loaded, self.judge, self.trained_on, out)

    def original(self, run: _Run) -> Any:
        run.measure(self.loaded.model, "original", ORIGINAL, None)
        return self.loaded.model

    def value(self, run: _Run, value: int) -> Any:
        """The model made with one value of the knob, taught and healed; every line is measured on the way."""
        source, method, plan = self.loaded.model, self.method, self.plan
        made = method.make(source, value, self.rows)
        run.measure(made, method.title(value), AFTER, value)
        if method.lesson is not None:
            taught = partial(method.lesson, made, source, run.text, self.rows)
            made = run.train(f"{TAUGHT} {method.name} {value}", taught)
            run.measure(made, f"{method.title(value)}, {TAUGHT}", TAUGHT, value)
        if plan.healing is not None:
            made = run.heal(made, plan.healing, self.teacher, f"{HEALED} {method.name} {value}")
            run.measure(made, f"{method.title(value)}, {HEALED}", HEALED, value)
        return made

    def control(self, run: _Run, value: int) -> None:
        """What the method compares its healing with, where it has that."""
        control = self.method.control(self.loaded.model, value, self.plan.healing)
        if control is not None:
            title, model, training = control
            run.measure(run.heal(model, training, self.teacher, "trained control"), title, CONTROL, None)


def _progress() -> Progress:
    """Of processes that were launched together the first one tells."""
    return Progress() if is_first() else Progress(Console(quiet=True))


@dataclass
class _Run:
    """Measures and trains models one after the other; what has been trained is kept until the whole run has ended."""

    loaded: Loaded
    judge: Judge
    text: Questions
    out: Path
    progress: Progress = field(default_factory=_progress)
    lines: list[dict[str, Any]] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)

    def measure(self, model: Any, title: str, stage: str, value: int | None) -> None:
        with self.progress.measure(title) as tell:
            figures = self.judge.measure(model, tell)
        self.lines.append({"title": title, "stage": stage, "value": value, **figures})

    def train(self, name: str, by: Callable[[Path, Tell], Any]) -> Any:
        keep = self.out.with_name(f".{self.out.name}.{name.replace(' ', '-')}")
        keep.parent.mkdir(parents=True, exist_ok=True)
        self.kept.append(keep)
        with self.progress.measure(name) as tell:
            return by(keep, tell)

    def heal(self, model: Any, training: Healing, teacher: Any, name: str) -> Any:
        by = self.loaded.model if teacher is None else teacher
        return self.train(name, lambda keep, tell: heal(model, self.text, training, teacher=by, keep=keep, tell=tell))

    def forget(self) -> None:
        for keep in self.kept:
            forget(keep)


def _convert(run: _Run, made: Conversion, write: bool) -> Any:
    """The last model made; every line is measured on the way."""
    found = made.original(run)
    for value in made.plan.values:
        found = made.value(run, value)
        if write:
            allow(made.plan, run.lines, "nothing is written")
    made.control(run, made.plan.values[-1])
    return found


def allow(plan: Plan, lines: Sequence[dict[str, Any]], then: str) -> None:
    """Damaged where a value's last line lost too much. What is no number is too much."""
    if plan.max_damage is None:
        return
    for line in {line["value"]: line for line in lines[1:] if line["value"] is not None}.values():
        cost = line["bits_per_token"] - lines[0]["bits_per_token"]
        if not cost <= plan.max_damage:
            given = f"more than --max-damage {plan.max_damage}"
            raise Damaged(f"{line['title']}: {cost:.3f} bits per token lost, {given}: {then}")


def made_record(made: Conversion, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    method, loaded = made.method, made.loaded
    return {
        "title": "; ".join(method.title(value) for value in made.plan.values),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": asdict(fingerprint(loaded.model, loaded.name)),
        "method": method.name,
        "knob": method.knob,
        "settings": made.settings,
        "rows": list(lines),
        "environment": environment(),
    }
