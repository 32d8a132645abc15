"""What a comparison trains and measures on. Every task is generated from a seed or is on the disk already."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from functools import cache
from typing import Any

from manyheads.near import suggest
from manyheads.tasks.task import IGNORED, Batch, Generated, Task, register_task, registered

__all__ = [
    "IGNORED",
    "Batch",
    "Generated",
    "Task",
    "create_task",
    "list_tasks",
    "register_task",
    "task_class",
    "task_group",
]


# By what papers call it.
KNOWN_AS = {"mqar": "recall", "selective-copying": "selective-copy"}


@cache
def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        importlib.import_module(module.name)


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    _load_all()
    return sorted(registered)


def task_group(name: str) -> tuple[str, ...]:
    """The tasks that a name stands for: `cab` for seven of them, a name that papers use for the one here, any other for
    itself."""
    from manyheads.tasks.cab import CAB

    if name == "cab":
        return tuple(task for tasks in CAB.values() for task in tasks)
    return (KNOWN_AS.get(name, name),)


def task_class(name: str) -> type[Task]:
    """The class registered under `name`. Raises ValueError with near names for an unknown one."""
    _load_all()
    if name not in registered:
        raise ValueError(
            f"unknown task {name!r}{suggest(str(name), registered)}; want one of {sorted(registered)}, or cab for seven"
        )
    return registered[name]


def create_task(name: str, **config: Any) -> Task:
    """Builds the task `name`; `config` are that task's own arguments."""
    cls = task_class(name)
    known = [field.name for field in fields(cls)]
    for given in config:
        if given not in known:
            takes = f"it takes {known}" if known else "it takes none"
            raise ValueError(f"task {name} has no argument {given!r}{suggest(given, known)}; {takes}")
    return cls(**config)
