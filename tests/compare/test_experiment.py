"""Experiments: what is accepted, what is refused and with which words, and which cells come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyheads import card, list_attentions
from manyheads.compare import cells as cells_module
from manyheads.compare.cells import cells_of_experiment
from manyheads.compare.command import _all_names, as_on_card, changes_of, parse_seeds
from manyheads.compare.experiment import PRESETS, create_experiment, preset, read_experiment
from manyheads.compare.train import unpassed
from manyheads.compare.worker import run_cell
from manyheads.runs.cells import Cell
from manyheads.runs.names import parse_name
from manyheads.tasks import list_tasks

TASK = {"name": "recall", "n": 16, "vocabulary": 16, "pairs": 2}


def cells(**changes: Any) -> list[Cell]:
    base: dict[str, Any] = {"mechanisms": ["softmax", "gqa"], "tasks": [TASK], "sections": ["quality"]}
    return cells_of_experiment(create_experiment(base | changes))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    built = create_experiment({"preset": name})
    assert len(built.mechanisms) >= 8
    assert set(preset(name)["recipes"]) == set(list_tasks())
    every = create_experiment({"preset": name, "tasks": list_tasks()})
    assert [task.name for task in every.tasks] == list_tasks()


def test_quick_covers_what_the_demo_shows() -> None:
    built = create_experiment()
    assert built.preset == "quick"
    assert [task.name for task in built.tasks] == ["recall", "text"]
    assert {"quality", "speed", "decode"} <= set(built.sections)


def test_task_settings_lie_on_the_shared_ones_on_the_recipe() -> None:
    recipe = preset("quick")["recipes"]["recall"]
    built = create_experiment(
        {
            "training": {"steps": 7, "batch_size": 5},
            "model": {"layers": 3},
            "tasks": [{"name": "recall", "pairs": 4, "training": {"steps": 9}}, "text"],
        }
    )
    recall, text = built.tasks
    assert recall.args == {"n": recipe["n"], "vocabulary": recipe["vocabulary"], "pairs": 4, "eval_examples": 256}
    assert (recall.training.steps, recall.training.batch_size, recall.model.layers) == (9, 5, 3)
    assert recall.training.eval_every == recipe["training"]["eval_every"]
    assert (text.training.steps, text.training.batch_size) == (7, 5)


def test_sections_change_single_settings() -> None:
    built = create_experiment({"speed": {"lengths": [32]}})
    assert built.speed.lengths == (32,)
    assert built.speed.hidden_size == preset("quick")["speed"]["hidden_size"]


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("training: {learning_rates: [3e-3, 1e-4]}\ntasks: [recall]\n")  # 3e-3 is text to YAML 1.1
    assert create_experiment(read_experiment(path)).tasks[0].training.learning_rates == (3e-3, 1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanism": ["softmax"]}, ["unknown key 'mechanism'", "did you mean 'mechanisms'", "known keys"]),
        ({"mechanisms": ["sofmax"]}, ["mechanisms.0", "unknown mechanism 'sofmax'", "'softmax'"]),
        ({"mechanisms": [{"name": "moba", "blocks": 3}]}, ["moba has no argument 'blocks'", "'block'"]),
        ({"mechanisms": [{"name": "moba", "block": 0}]}, ["mechanisms.0", "block=0"]),
        ({"mechanisms": [{"name": "moba", "causal": True}]}, ["'causal' follows from the task"]),
        ({"mechanisms": []}, ["mechanisms", "at least 1 item"]),
        ({"mechanisms": ["gqa", "gqa"]}, ["gqa is there twice"]),
        ({"mechanisms": "gqa"}, ["mechanisms", 'got "gqa"']),
        ({"mechanisms": [7]}, ["mechanisms.0", "got 7"]),
        ({"tasks": ["recal"]}, ["tasks.0", "unknown task 'recal'", "'recall'"]),
        ({"tasks": [{"name": "recall", "pears": 4}]}, ["recall has no argument 'pears'", "'pairs'"]),
        ({"tasks": [{"name": "recall", "pairs": 99}]}, ["tasks.0", "pairs=99"]),
        ({"tasks": [{"name": "recall", "model": {"layer": 2}}]}, ["'tasks.0.model.layer'", "'layers'"]),
        ({"tasks": ["recall", "recall"]}, ["recall", "twice"]),
        ({"tasks": []}, ["quality section needs a task"]),
        ({"training": {"step": 3}}, ["'training.step'", "did you mean 'steps'"]),
        ({"training": {"steps": 0}}, ["training.steps", "greater than or equal to 1", "got 0"]),
        ({"training": {"steps": "many"}}, ["mine.yaml: training.steps", "valid integer", 'got "many"']),
        ({"training": {"learning_rates": [-1]}}, ["learning_rates.0", "greater than 0", "got -1"]),
        ({"training": {"learning_rates": [float("inf")]}}, ["learning_rates.0", "finite"]),
        ({"model": {"positions": "rotery"}}, ["model.positions", "'rotary'", 'got "rotery"']),
        ({"model": {"hidden_size": 30, "heads": 4}}, ["hidden_size 30 is not divisible by heads 4", "[1, 2, 3"]),
        ({"speed": {"length": [3]}}, ["'speed.length'", "did you mean 'lengths'"]),
        ({"model": 3}, ["mine.yaml: model", "got 3"]),
        ({"speed": 3}, ["speed", "got 3"]),
        ({"sections": ["qality"]}, ["sections.0", "'quality'", 'got "qality"']),
        ({"seeds": [-1]}, ["seeds.0", "got -1"]),
        ({"preset": "quik"}, ["unknown preset 'quik'", "'quick'"]),
        ({"preset": ["quick"]}, ["unknown preset", "want one of"]),
        ({"device": "gpu"}, ["device", "'cuda'"]),
    ],
)
def test_wrong_experiments_say_what_is_wrong(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        create_experiment(changes, where="mine.yaml")
    text = str(caught.value)
    assert text.startswith("mine.yaml: ")
    for word in words:
        assert word in text
    assert "pydantic" not in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("content", ["- a\n- b\n", "{", "just words", "", "a: [1\n"])
def test_files_that_are_no_experiment(content: str, tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"e\.yaml"):
        read_experiment(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_experiment(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_experiment(tmp_path)


def test_yaml_builds_nothing_but_data(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"mechanisms: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_experiment(path)
    assert not (tmp_path / "made").exists()


def test_quality_cells_are_every_combination() -> None:
    found = cells(seeds=[0, 3], training={"learning_rates": [1e-3, 1e-2]})
    places = {(c.mechanism, c.place["task"], c.place["seed"], c.place["learning_rate"]) for c in found}
    assert places == {(m, "recall", s, r) for m in ("softmax", "gqa") for s in (0, 3) for r in (1e-3, 1e-2)}
    assert len({c.key for c in found}) == len(found) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": [1]},
        {"training": {"steps": 3}},
        {"training": {"learning_rates": [0.5]}},
        {"training": {"router_weight": 0.5}},
        {"model": {"hidden_size": 64}},
        {"tasks": [TASK | {"pairs": 1}]},
        {"mechanisms": [{"name": "softmax", "bias": True}, "gqa"]},
        {"precision": "bfloat16"},
        {"device": "cpu"},
    ],
)
def test_a_setting_that_matters_makes_another_cell(changes: dict[str, Any]) -> None:
    assert cells(**changes)[0].key != cells()[0].key


def test_what_does_not_matter_leaves_the_cell_alone() -> None:
    first = cells()
    assert [c.key for c in cells(speed={"lengths": [64]})] == [c.key for c in first]
    assert cells(mechanisms=["gqa"])[0].key == first[1].key
    assert cells(training={"learning_rates": [first[0].place["learning_rate"], 0.5]})[0].key == first[0].key


def test_an_edited_mechanism_is_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cells()[0].key
    real = cells_module.inspect.getsource
    monkeypatch.setattr(cells_module.inspect, "getsource", lambda module: real(module) + "# edited")
    assert cells()[0].key != before


def test_another_version_makes_other_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cells()[0].key
    monkeypatch.setattr("manyheads.__version__", "99.0.0")
    assert cells()[0].key != before


def test_undeclared_patterns_are_known_beforehand() -> None:
    found = cells(mechanisms=["softmax", "mswa", "hilo"], tasks=["recall", "lookup", "digits-grid"])
    reasons = {(c.mechanism, c.place["task"]): c.undeclared for c in found}
    assert not any(reasons["softmax", task] for task in ("recall", "lookup"))
    assert reasons["mswa", "lookup"] == "lookup needs noncausal-cross; mswa declares causal-self"
    assert "needs causal-self" in reasons["hilo", "recall"]
    assert not reasons["hilo", "digits-grid"]
    assert not reasons["softmax", "digits-grid"]  # sees the cells of the grid as a sequence


def test_tasks_of_one_name_are_told_apart() -> None:
    found = cells(mechanisms=["gqa"], tasks=[TASK, TASK | {"n": 32}, TASK | {"vocabulary": 32}])
    labels = [(c.place["task"], c.place["n"]) for c in found]
    assert labels == [("recall[vocabulary=16]", 16), ("recall[vocabulary=16]", 32), ("recall[vocabulary=32]", 16)]
    assert [c.place["task"] for c in cells(mechanisms=["gqa"], tasks=[TASK, TASK | {"n": 32}])] == ["recall"] * 2


def test_lengths_ascend_within_a_chain() -> None:
    found = cells(
        sections=["speed", "decode"], speed={"lengths": [64, 32], "turns": 1}, decode={"contexts": [9, 8], "turns": 1}
    )
    speed = [c for c in found if c.kind == "speed"]
    assert [(c.mechanism, c.place["n"]) for c in speed] == [
        ("softmax", 32),
        ("softmax", 64),
        ("gqa", 32),
        ("gqa", 64),
    ]
    assert len({c.chain for c in speed}) == 2
    assert [c.place["context"] for c in found if c.kind == "decode"] == [8, 9, 8, 9]


def test_names_on_the_command_line() -> None:
    assert parse_name("moba") == "moba"
    assert parse_name("moba[block=64,top_k=2]") == {"name": "moba", "block": 64, "top_k": 2}
    assert parse_name("softmax[bias=true]") == {"name": "softmax", "bias": True}
    with pytest.raises(ValueError, match="'block' is no argument; want NAME"):
        parse_name("moba[block]")
    assert parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("1") == [0]
    assert parse_seeds("0,7") == [0, 7]
    assert parse_seeds("5,") == [5]
    for wrong in ("", "0", "-1", "a", "1.5", ",", "1,,2"):
        with pytest.raises(ValueError, match="want how many"):
            parse_seeds(wrong)


def test_bare_names_have_the_arguments_of_the_preset() -> None:
    changes = changes_of({}, ["softmax", "moba", "moba[block=8]"], None, ["text"], "2", ["quality"])
    built = create_experiment(changes)
    labels = [entry.label for entry in built.mechanisms]
    assert labels == ["softmax", "moba[block=16,top_k=2]", "moba[block=8]"]
    assert built.seeds == (0, 1)
    assert [task.name for task in built.tasks] == ["text"]
    assert built.sections == ("quality",)


def test_bare_names_have_the_arguments_of_the_file() -> None:
    file = {"mechanisms": [{"name": "moba", "block": 4}, {"name": "moba", "block": 2}, "gqa"], "tasks": [TASK, "text"]}
    built = create_experiment(file | changes_of(file, ["moba", "mqa"], tasks=["recall"]))
    assert [entry.label for entry in built.mechanisms] == ["moba[block=4]", "moba[block=2]", "mqa"]
    assert [task.args["n"] for task in built.tasks] == [16]


def test_a_preset_knows_arguments_of_names_that_are_not_in_its_list() -> None:
    assert changes_of({}, ["h3", "gqa", "moba"])["mechanisms"] == [
        {"name": "h3", "taps": 4},
        "gqa",
        {"name": "moba", "block": 16, "top_k": 2},
    ]
    # An experiment that names it means it as it is there.
    assert changes_of({"mechanisms": ["h3"]}, ["h3"])["mechanisms"] == ["h3"]
    assert changes_of({}, ["h3[taps=9]"])["mechanisms"] == [{"name": "h3", "taps": 9}]
    for name in PRESETS:
        for mechanism, arguments in preset(name).get("arguments", {}).items():
            assert create_experiment({"preset": name, "mechanisms": [{"name": mechanism, **arguments}]}).mechanisms


def test_a_mechanism_of_one_head_keeps_it_in_every_section() -> None:
    assert as_on_card("label-dependent") == {"name": "label-dependent", "heads": 1}
    changes = {"mechanisms": ["softmax", as_on_card("label-dependent")], "tasks": ["digits-patches"]}
    built = create_experiment(changes | {"sections": ["quality", "speed"], "training": {"steps": 1}})
    cells = [cell for cell in cells_of_experiment(built) if cell.mechanism == "label-dependent[heads=1]"]
    outcomes = [run_cell(cell.kind, cell.settings) for cell in (cells[0], cells[1])]
    assert [(cell.kind, outcome["error"]) for cell, outcome in zip(cells[:2], outcomes, strict=True)] == [
        ("quality", None),
        ("speed", None),
    ]


def test_all_names_every_mechanism_that_a_task_has_a_place_for() -> None:
    def of(*patterns: str) -> list[str]:
        beside = {"token_kinds", "boxes"}  # which none of the tasks below has
        found = {n for p in patterns for n in list_attentions(pattern=p) if not unpassed(n)}
        return sorted(
            n for n in found if all(card(n).takes[k].startswith("optional") for k in card(n).takes.keys() & beside)
        )

    assert _all_names({}, None, tasks=["digits-patches"]) == of("noncausal-self", "pool")
    assert _all_names({"tasks": [{"name": "lookup"}]}, None) == of("noncausal-cross")
    assert _all_names({}, None, tasks=["recall", "lookup"]) == of("noncausal-cross", "causal-self")
    with pytest.raises(ValueError, match="unknown task 'recal'; did you mean 'recall'"):
        _all_names({}, None, tasks=["recal"])
    names = _all_names({}, None)
    assert names == of("causal-self")
    entries = [as_on_card(name) for name in names]
    assert [entry if isinstance(entry, str) else entry["name"] for entry in entries] == names
    built = create_experiment(changes_of({}, names, tasks=["recall"]) | {"mechanisms": entries})
    assert len(built.mechanisms) == len(names)
    with pytest.raises(ValueError, match="leave names"):
        _all_names({}, ["softmax"])
    with pytest.raises(ValueError, match="leave names"):
        _all_names({"mechanisms": ["softmax"]}, None)


def test_one_task_is_compared_at_several_widths() -> None:
    """Width is an axis of its own, as in the published sweeps of recall. What is the same twice is still refused."""
    task = {"name": "recall", "model": {"hidden_size": 64}}
    wide = {"name": "recall", "model": {"hidden_size": 128}}
    swept = create_experiment({"mechanisms": ["gqa"], "sections": ["quality"], "tasks": [task, wide]})
    cells = cells_of_experiment(swept)
    assert [cell.place["task"] for cell in cells] == ["recall[hidden_size=64]", "recall[hidden_size=128]"]
    assert [cell.settings["model"]["hidden_size"] for cell in cells] == [64, 128]
    assert len({cell.key for cell in cells}) == 2
    longer = create_experiment({"mechanisms": ["gqa"], "sections": ["quality"], "tasks": [task, wide | {"n": 128}]})
    assert [cell.place["task"] for cell in cells_of_experiment(longer)] == ["recall", "recall"]
    with pytest.raises(ValueError, match=r"the task recall\[.*\] is there twice"):
        create_experiment({"mechanisms": ["gqa"], "tasks": [task, dict(task)]})
