"""Several mechanisms as one contestant, and quality over the state of whole models at several widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.compare.cells import cells_of_experiment, measured_pattern
from manyheads.compare.command import changes_of, depths, resized
from manyheads.compare.experiment import Experiment, create_experiment
from manyheads.compare.hybrid import common_patterns, deepened, of_a_layer
from manyheads.compare.run import run_experiment
from manyheads.compare.sweeps import bare, sweep_plots, swept
from manyheads.compare.train import build_model, placed, state_bytes
from manyheads.compare.worker import run_cell
from manyheads.runs.names import parse_names
from manyheads.tasks import create_task

TASK = {"name": "recall", "n": 16, "vocabulary": 16, "pairs": 2, "eval_examples": 8}
SIZE = {"hidden_size": 16, "heads": 4, "layers": 4, "intermediate_size": 0, "short_conv": 3, "positions": "none"}


def tiny(mechanisms: list[Any], **changes: Any) -> Experiment:
    whole = {
        "mechanisms": mechanisms,
        "tasks": [TASK],
        "model": {"hidden_size": 16},
        "training": {"steps": 2, "batch_size": 4, "eval_every": 2, "learning_rates": [0.003]},
        "sections": ["quality"],
        "speed": {"hidden_size": 16, "lengths": [8], "turns": 1, "repeats": 1},
        "decode": {"hidden_size": 16, "contexts": [16], "turns": 1, "tokens": 2},
    }
    return create_experiment(whole | changes)


def test_commas_outside_brackets_part_the_layers() -> None:
    assert parse_names("based") == "based"
    assert parse_names("moba[block=4,top_k=2]") == {"name": "moba", "block": 4, "top_k": 2}
    assert parse_names("based, moba[block=4,top_k=2],softmax") == [
        "based",
        {"name": "moba", "block": 4, "top_k": 2},
        "softmax",
    ]
    for wrong in (",based", "based,", "based,,softmax"):
        with pytest.raises(ValueError, match="nothing stands beside one of its commas"):
            parse_names(wrong)


def test_layers_of_a_hybrid_have_the_arguments_of_the_preset() -> None:
    built = create_experiment(changes_of({}, ["moba,softmax", "softmax"], tasks=["recall"]))
    assert [entry.label for entry in built.mechanisms] == ["moba[block=16,top_k=2],softmax", "softmax"]
    twice = {"mechanisms": [{"name": "moba", "block": 4}, {"name": "moba", "block": 2}]}
    with pytest.raises(ValueError, match="moba is there 2 times in the experiment"):
        changes_of(twice, ["moba,softmax"])


def test_the_model_is_as_much_deeper_for_all_unless_it_was_said() -> None:
    built = tiny([["based", "based", "softmax"], ["gqa", "softmax"], "softmax"])
    assert [task.model.layers for task in built.tasks] == [6]
    assert depths(built) == ["recall in 6 layers for all, as based,based,softmax; gqa,softmax wants it"]
    assert tiny(["softmax"]).tasks[0].model.layers == 1
    assert depths(tiny(["softmax"])) == []
    assert tiny([["gqa", "softmax"]], model={"layers": 4, "hidden_size": 16}).tasks[0].model.layers == 4
    with pytest.raises(ValueError, match="gqa,softmax is of 2 layers and the model of 3; want a multiple"):
        tiny([["gqa", "softmax"]], model={"layers": 3, "hidden_size": 16})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["hilo", "mswa"], "no pattern is common to the layers hilo,mswa: hilo declares .*; mswa declares causal-self"),
        (["softmax"], "want a hybrid as a list of two or more"),
        (["softmax", ["gqa", "softmax"]], "none of them a list again"),
        (["softmax", "sofmax"], r"mechanisms\.0\.layers\.1: unknown mechanism 'sofmax'"),
        ({"layers": ["gqa", "softmax"], "bias": True}, "each with its own arguments"),
    ],
)
def test_what_is_no_hybrid_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny([given])


def test_widths_and_layers_of_the_command_line() -> None:
    changes = {"mechanisms": ["gqa"], "tasks": [{**TASK, "model": {"layers": 2}}, "induction"], "sections": ["quality"]}
    built = create_experiment(changes | resized(changes, [32, 64], 3))
    sizes = [(task.name, task.model.hidden_size, task.model.layers) for task in built.tasks]
    assert sizes == [("recall", 32, 3), ("recall", 64, 3), ("induction", 32, 3), ("induction", 64, 3)]
    assert resized(changes, [], None) == {}
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by heads 4"):
        create_experiment(changes | resized(changes, [30], None))


def test_layers_stand_in_order_and_begin_again() -> None:
    task = create_task(**TASK)
    model = build_model(task, [{"name": "mswa", "window": 4}, {"name": "softmax"}], SIZE)
    assert [block.self_attn.mechanism.card.name for block in model.base_model.stack.layers] == [
        "mswa",
        "softmax",
        "mswa",
        "softmax",
    ]
    with pytest.raises(ValueError, match="want a multiple, such as 3"):
        deepened([{"name": "gqa"}] * 3, 4)
    with pytest.raises(ValueError, match="recall needs causal-self; hilo,hilo declares"):
        placed(task, [{"name": "hilo"}] * 2)


def test_a_hybrid_is_measured_by_what_all_of_its_layers_declare() -> None:
    assert measured_pattern("softmax", "mswa") == "causal-self"
    assert common_patterns(["softmax", "mswa"]) == {"causal-self"}
    built = tiny([["mswa", "softmax"], ["multi-scale", "softmax"]], sections=["decode"])
    reasons = {cell.mechanism: cell.undeclared for cell in cells_of_experiment(built)}
    assert reasons["mswa,softmax"] == ""
    assert reasons["multi-scale,softmax"] == "multi-scale,softmax does not decode step by step"


def test_costs_are_of_a_mean_layer() -> None:
    asked: list[str] = []

    def measure(settings: Any) -> dict[str, Any]:
        asked.append(settings["mechanism"]["name"])
        many = 3 if settings["mechanism"]["name"] == "gqa" else 1
        return {"forward_s": 1.0 * many, "state_bytes": 10 * many, "forward_flops": None, "device": "cpu"}

    layers = [{"name": name, "args": {}, "source": ""} for name in ("gqa", "softmax", "gqa", "softmax", "softmax")]
    mean = of_a_layer(measure)({"mechanism": {"layers": layers}})
    assert asked == ["gqa", "softmax"]
    assert mean == {"forward_s": pytest.approx(1.8), "state_bytes": 18, "forward_flops": None, "device": "cpu"}

    def failing(settings: Any) -> dict[str, Any]:
        return {"status": "failed", "error": "no", "stop": "no"}

    assert of_a_layer(failing)({"mechanism": {"layers": layers}})["error"] == "layer gqa: no"


def test_decode_state_is_the_mean_of_the_layers() -> None:
    cells = cells_of_experiment(tiny([["mswa", "softmax"], "mswa", "softmax"], sections=["decode"]))
    found = {cell.mechanism: run_cell(cell.kind, cell.settings) for cell in cells}
    both, each = found["mswa,softmax"], [found[name]["state_bytes"] for name in ("mswa", "softmax")]
    assert both["state_bytes"] == sum(each) / 2


def test_state_of_a_model_is_summed_over_its_layers() -> None:
    """Keys and values of width 16 in float32, half of them where two heads share one."""
    task = create_task(**TASK)
    rows = next(iter(task.eval_batches(1))).inputs["input_ids"].shape[1]
    half = {"name": "gqa", "kv_heads": 2}
    for specs, layers in (([{"name": "softmax"}], 4.0), ([half, {"name": "softmax"}], 3.0), ([half], 2.0)):
        model = build_model(task, specs, SIZE)
        assert state_bytes(task, model, torch.device("cpu")) == layers * rows * 2 * 16 * 4
    images = create_task("digits-patches")
    assert state_bytes(images, build_model(images, {"name": "softmax"}, SIZE), torch.device("cpu")) is None


def test_bare_names() -> None:
    assert bare("based[feature_dim=8],mswa[window=16]") == "based,mswa"
    assert bare("multi-scale[scales=[1,2]],softmax") == "multi-scale,softmax"


def test_a_sweep_over_widths_and_hybrids_ends_as_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.compare.charts.write_png", lambda *_: [])
    tasks = [TASK | {"model": {"hidden_size": width}} for width in (16, 32)]
    mechanisms = ["softmax", ["mswa", "softmax"], [{"name": "mswa", "window": 4}, "softmax"]]
    results = run_experiment(tiny(mechanisms, tasks=tasks, model={}), tmp_path / "out")
    assert [cell["error"] for cell in results["cells"]] == [None] * 6
    points = swept(results)["recall"]
    assert {(point["kind"], point["width"]) for point in points} == {
        (kind, width) for kind in ("softmax", "mswa,softmax") for width in (16, 32)
    }
    state = {(point["mechanism"], point["width"]): point["model_state_bytes"] for point in points}
    assert state["softmax", 32] == 2 * state["softmax", 16]
    assert state["mswa[window=4],softmax", 16] < state["mswa,softmax", 16] <= state["softmax", 16]
    assert [plot.name for plot in sweep_plots(results)] == ["sweep-state-recall", "sweep-width-recall"]
    assert "sweep-state-recall" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    again = run_experiment(tiny(["softmax"], tasks=tasks, model={"layers": 2}), tmp_path / "alone")
    assert [plot.name for plot in sweep_plots(again)] == ["sweep-state-recall", "sweep-width-recall"]
