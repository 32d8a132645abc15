"""A trained model scored beyond the length it was trained at."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.charts import plots
from manyheads.compare.command import changes_of, resized
from manyheads.compare.experiment import Experiment, create_experiment
from manyheads.compare.run import run_experiment
from manyheads.compare.summary import summarise
from manyheads.compare.tables import print_table, summary_table
from manyheads.compare.train import evaluate
from manyheads.runs.results import done
from manyheads.tasks import create_task

RECALL = {"name": "recall", "n": 16, "vocabulary": 16, "pairs": 2, "eval_examples": 8}


def small(mechanisms: list[Any], task: dict[str, Any] = RECALL, **changes: Any) -> Experiment:
    training = {"steps": 2, "batch_size": 4, "eval_every": 2, "learning_rates": [0.003], "beyond": [2, 4]}
    whole = {"mechanisms": mechanisms, "tasks": [task], "model": {"hidden_size": 16}, "training": training}
    return create_experiment(whole | {"sections": ["quality"]} | changes)


def test_the_model_is_scored_on_longer_examples_of_the_same_task(tmp_path: Path) -> None:
    results = run_experiment(small(["softmax", "based"], seeds=[0, 1]), tmp_path)
    for row in summarise(results):
        points = row["quality"]["recall"]["beyond"]
        assert [(point["times"], point["n"], point["seeds"], point["error"]) for point in points] == [
            (2, 32, 2, None),
            (4, 64, 2, None),
        ]
        own = [cell["beyond"] for cell in results["cells"] if cell["mechanism"] == row["mechanism"]]
        for place, point in enumerate(points):
            values = torch.tensor([each[place]["value"] for each in own], dtype=torch.float64)
            torch.testing.assert_close(point["mean"], float(values.mean()))
            torch.testing.assert_close(point["std"], float(values.std()))
    titles = [column.title for column in summary_table(results)[0]]
    assert titles[1:4] == ["recall", "recall ×2", "recall ×4"]
    drawn = {plot.name: plot for plot in plots(results)}
    values = drawn["beyond-recall"].spec(400)["data"]["values"]
    assert sorted({row["n"] for row in values}) == [16, 32, 64]


def test_a_score_beyond_is_that_of_the_longer_task() -> None:
    """By a model that answers with what it is asked: the longer task's own share of that."""

    class Told(torch.nn.Module):
        reads: frozenset[str] = frozenset()

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = torch.nn.functional.one_hot(input_ids, 16).float()
            return type("Output", (), {"logits": logits})()

    task = create_task(**RECALL).longer(4)
    assert task == create_task(**RECALL | {"n": 64})
    assert evaluate(task, Told(), torch.device("cpu")).answers == 8 * 2


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [
        ("rcmha", "that no step of training changed are read at n 32: what it learnt ends at n 16"),
        ({"name": "hyena", "learned_positions": True}, "what it learnt ends at n 16"),
        ({"name": "hyena", "max_length": 24}, "max_length"),
    ],
)  # fmt: skip
def test_learned_positions_end_where_training_ended(tmp_path: Path, mechanism: Any, words: str) -> None:
    results = run_experiment(small([mechanism]), tmp_path)
    (cell,) = results["cells"]
    assert done(cell)
    assert cell["value"] is not None
    assert [point["value"] for point in cell["beyond"]] == [None, None]
    assert all(words in point["error"] for point in cell["beyond"][:1])
    from rich.console import Console

    text = StringIO()
    print_table(results, Console(file=text, width=300))
    assert "cannot" in text.getvalue()
    assert f"no score at recall ×2, {cell['mechanism']}:" in text.getvalue()


def test_clipped_distances_within_the_trained_length_go_on(tmp_path: Path) -> None:
    near = {"name": "shaw", "max_distance": 4}
    (cell,) = run_experiment(small([near]), tmp_path)["cells"]
    assert [point["error"] for point in cell["beyond"]] == [None, None]
    far = {"name": "shaw", "max_distance": 24}
    (cell,) = run_experiment(small([far]), tmp_path / "far")["cells"]
    assert [point["value"] for point in cell["beyond"]] == [None, None]


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        (RECALL, {"positions": "learned"}, r"recall: beyond=\[2, 4\], but its model learns a position for each place"),
        ({"name": "gcog"}, {"positions": "none"}, "gcog: no argument of it makes its examples longer"),
        ({"name": "maze"}, {"positions": "none"}, "maze: no argument of it makes its examples longer"),
        ({"name": "induction", "n": 128}, {}, "vocabulary=256; want a whole number from 512"),
    ],
)
def test_what_has_no_longer_form_is_refused(task: dict[str, Any], model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(["softmax"], task, model=model)


def test_functions_have_more_points_and_no_more_bits() -> None:
    task = create_task("functions", kind="parity", bits=4, points=6)
    assert task.longer(2) == create_task("functions", kind="parity", bits=4, points=12)
    with pytest.raises(ValueError, match="times=1; want a whole number from 2 to 64"):
        task.longer(1)


def test_the_command_line_asks_for_it_and_stored_cells_stay_what_they_were() -> None:
    changes = changes_of({}, ["softmax"], tasks=["functions"], sections=["quality"])
    asked = changes | resized(changes, [], None, "none", [2, 2, 4])
    (entry,) = create_experiment(asked).tasks
    assert (entry.model.positions, entry.training.beyond, entry.training.steps) == ("none", (2, 4), 400)
    (cell,) = cells_of_experiment(create_experiment(changes))
    assert "beyond" not in cell.settings["training"]
