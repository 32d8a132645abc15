"""What a command line asks of a teacher: who it is, whether it can teach, and whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from manyheads.convert.adapters import check_peft
from manyheads.convert.healing import FORMS, Healing
from manyheads.convert.lessons import check_teacher
from manyheads.convert.methods import Distilled
from manyheads.hosts.loading import Loaded, load_model


def check_healing(to: str, heal: str | None, healing: str | None, against: str | None) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    if healing is not None and healing not in FORMS:
        raise ValueError(f"--healing {healing!r}: want one of {', '.join(FORMS)}")
    if healing is not None and heal is None:
        raise ValueError(f"--healing {healing} says how, and --heal TOKENS how long: give both")
    if against is not None and healing != "distil" and to != "distil":
        raise ValueError(f"--against {against} is a teacher, for --healing distil or --to distil: give one of them")
    if healing == "lora":
        check_peft()


def load_teacher(loaded: Loaded, against: str | None, dtype: str) -> Loaded | None:
    if against is None:
        return None
    teacher = load_model(against, dtype=dtype)
    check_teacher(loaded, teacher)
    return teacher


def distilling(
    method: Any, loaded: Loaded, teacher: Loaded | None, teaching: Healing | None, healing: Healing | None
) -> tuple[Distilled, Loaded]:
    """The method with its lesson, and the source that the student is measured against: the teacher."""
    if teaching is None and healing is None:
        raise ValueError("--to distil: nothing would teach the student; give --transfer STEPS or --heal TOKENS")
    if teacher is None:
        return replace(method, teaching=teaching), loaded
    return replace(method, teaching=teaching, start=loaded.model), teacher
