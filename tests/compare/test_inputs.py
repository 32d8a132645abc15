"""What reads more than its tokens is not measured on anything else: cards say so, and `compare` refuses by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.compare import run
from manyheads.compare.command import _all_names, unpassed_names
from manyheads.compare.train import has_place, placed
from manyheads.registry import list_attentions, mechanism_class
from manyheads.tasks import create_task, list_tasks, task_class

READ_MORE = [
    "conditional-attention", "dare", "global-local", "largegt",
    "modality-mutual", "scale-adaptive", "theme-transformer", "vitgaze",
]  # fmt: skip
# How docstrings speak of features, or rows, of x that are no states of its tokens.
SMUGGLED = re.compile(r"\blast (`\w+`\s+|three\s+)?features?\b|\bx \[b, n, dim\] holds\b|x: \[b, layers, dim\]")


def test_nothing_is_read_out_of_the_features_of_x() -> None:
    told = [name for name in list_attentions() if SMUGGLED.search(inspect.getdoc(mechanism_class(name)) or "")]
    assert told == []


@pytest.mark.parametrize("task", list_tasks())
def test_no_task_has_a_place_for_them(task: str) -> None:
    assert not any(has_place(task_class(task), name) for name in READ_MORE)


BESIDE = {"mixture-of-transformers": ["modalities"], "modality-gate": ["modalities"], "skim": ["forms"]}


@pytest.mark.parametrize("name", list(BESIDE))
def test_what_reads_kinds_or_boxes_has_a_place_where_they_are(name: str) -> None:
    assert [task for task in list_tasks() if has_place(task_class(task), name)] == BESIDE[name]
    with pytest.raises(ValueError, match=r"skim .* tokens, and digits-patches has it not: boxes \(\[b, n, 4\]"):
        placed(create_task("digits-patches"), {"name": "skim"})


def test_what_reads_other_layers_has_a_place_in_every_causal_task() -> None:
    causal = [name for name in list_tasks() if task_class(name).pattern == "causal-self"]
    for name in ("back-attention", "layer-shortcuts"):
        assert [task for task in list_tasks() if has_place(task_class(task), name)] == causal
    task = create_task("induction")
    assert placed(task, {"name": "layer-shortcuts"}, 2)["layers"] == ["softmax", {"name": "layer-shortcuts"}]
    assert placed(task, {"name": "back-attention"}, 1)["back"] == {"name": "back-attention"}
    assert placed(create_task("digits-patches"), {"name": "multi-layer-pooling"})["layers"] == ["softmax"]


def test_labels_of_edges_are_what_graphs_have() -> None:
    assert [task for task in list_tasks() if has_place(task_class(task), "relation-aware")] == [
        "communities",
        "far-away",
    ]


def test_all_leaves_them_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unpassed_names() == READ_MORE
    assert not set(_all_names({}, None, tasks=list_tasks())) & set(READ_MORE)
    asked: list[str] = []

    def stop(built: Any, *_: Any, **__: Any) -> None:
        asked.extend(entry.name for entry in built.mechanisms)
        raise ValueError("the run itself is measured elsewhere")

    monkeypatch.setattr(run, "run_experiment", stop)
    given = ["compare", "--all", "--task", "recall", "--section", "decode", "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, given)
    told = next(line for line in ran.stderr.splitlines() if line.startswith("left out, as they read more"))
    assert all(name in told for name in READ_MORE)
    assert len(asked) > 40
    assert not set(asked) & set(READ_MORE)


def test_show_tells_what_is_read() -> None:
    shown = CliRunner().invoke(app, ["show", "skim"]).stdout
    assert re.search(r"^ +takes  boxes: \[b, n, 4\] integers", shown, re.MULTILINE)
