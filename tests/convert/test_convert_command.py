"""`manyheads convert` as it is typed: folders that open, damage told, what is refused, and a run that was stopped."""

import json
from math import nan
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from transformers import AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert import healing as healing_module
from manyheads.convert import loop as loop_module
from manyheads.convert.damage import Judge, Sizes
from manyheads.convert.healing import Healing, batch, heal
from manyheads.convert.keeping import forget
from manyheads.convert.run import Damaged, Plan, allow
from manyheads.hosts.loading import load_model
from manyheads.hosts.questions import Questions, library_text

SMALL = ["--windows", "1", "--keys", "1", "--length", "128", "--calibrate", "256"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convert") / "gqa"
    assert run("--to", "gqa", "--kv-heads", "2", *SMALL, "--out", str(out)) == 0
    return out


def test_the_folder_opens_without_manyheads(converted: Path) -> None:
    # The process that programs are forked from has imported manyheads: it is forgotten, and not to be found again.
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING as known;"
        "known._extra_content.clear(); A._model_mapping._extra_content.clear();"
        "sys.modules |= dict.fromkeys([m for m in sys.modules if m.split('.')[0] == 'manyheads'] + ['manyheads']);"
        f"m = A.from_pretrained({str(converted)!r}); print(type(m).__name__, type(m).__module__,"
        "m.config.num_key_value_heads)"
    )
    done = forked.run("-c", code)
    assert done.stdout.split() == ["LlamaForCausalLM", "transformers.models.llama.modeling_llama", "2"], done.stderr


def test_the_record_says_what_it_cost(converted: Path) -> None:
    record = json.loads((converted / "conversion.json").read_text())
    before, after = record["rows"]
    assert before["kl_bits"] == 0.0
    assert after["bits_per_token"] > before["bits_per_token"]
    assert after["cache_bytes"] * 2 == before["cache_bytes"]
    assert after["keys"] == 1
    assert "gqa 2, procrustes" in (converted / "README.md").read_text()


def test_check_tells_a_changed_weight(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", str(converted)) == 0
    assert "transformers opens it with no code of ours; equal to what was written" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    (tmp_path / "conversion.json").write_text((converted / "conversion.json").read_text())
    assert run("check", str(tmp_path)) == 1
    assert "NOT what was written" in capsys.readouterr().out


SWEPT = ["cells", "conversion.html", "conversion.json", "experiment.json"]


def test_a_dry_run_measures_several_and_writes_no_weights(tmp_path: Path) -> None:
    out = tmp_path / "dry"
    assert run("--kv-heads", "4,2", "--dry-run", "--align", "mean", *SMALL, "--out", str(out), "--json") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "cells",
        "conversion.html",
        "conversion.json",
        "experiment.json",
    ]
    rows = json.loads((out / "conversion.json").read_text())["rows"]
    assert [row["title"] for row in rows] == ["original", "gqa 4, mean", "gqa 2, mean"]
    assert rows[1]["bits_per_token"] == pytest.approx(rows[0]["bits_per_token"], abs=1e-5)


def test_a_latent_opens_as_a_stock_class_and_a_budget_chooses_its_rank(tmp_path: Path) -> None:
    out = tmp_path / "mla"
    assert run("--to", "mla", "--budget-bytes", "2048", *SMALL, "--out", str(out), "--json") == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert 4 * (model.config.kv_lora_rank + model.config.qk_rope_head_dim) * 4 == 2048
    record = json.loads((out / "conversion.json").read_text())
    assert record["rows"][1]["cache_bytes"] == 2048 * 128
    assert run("check", str(out)) == 0
    told = model.generate(torch.tensor([list(b"The pass key is")]), max_new_tokens=4, do_sample=False)
    assert told.shape == (1, 19)


def test_a_mechanism_in_some_layers_learns_from_those_that_it_replaces(tmp_path: Path) -> None:
    out = tmp_path / "made"
    arguments = ["--to", "hedgehog", "--layers", "2-3", "--transfer", "12", *SMALL, "--out", str(out)]
    assert run(*arguments) == 0
    assert run("check", str(out)) == 0
    _, after, taught = json.loads((out / "conversion.json").read_text())["rows"]
    assert [after["stage"], taught["stage"]] == ["right after", "taught"]
    assert taught["kl_bits"] < after["kl_bits"]
    model = load_model(out).model
    assert [spec if isinstance(spec, str) else spec["name"] for spec in model.config.layers] == [
        "softmax", "softmax", "hedgehog", "hedgehog",
    ]  # fmt: skip


def test_too_much_damage_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gqa"
    arguments = ["--kv-heads", "1", "--align", "mean", "--max-damage", "0.1", *SMALL, "--out", str(out)]
    assert run(*arguments) == 3
    assert "nothing is written" in capsys.readouterr().err
    assert not out.exists()


def test_too_much_damage_is_told_after_a_dry_run_and_after_healing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry"
    limits = ["--align", "mean", "--max-damage", "0.1"]
    # The last value loses nothing; the first does.
    assert run("--kv-heads", "1,4", "--dry-run", *limits, *SMALL, "--out", str(out)) == 3
    assert "gqa 1, mean: " in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "cells",
        "conversion.html",
        "conversion.json",
        "experiment.json",
    ]
    assert run("--kv-heads", "1", "--heal", "1k", *limits, *SMALL, "--out", str(tmp_path / "healed")) == 3
    assert "gqa 1, mean, healed: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [out]
    assert run("--kv-heads", "4", *limits, *SMALL, "--out", str(tmp_path / "same")) == 0


def test_what_is_no_number_is_too_much_damage() -> None:
    lines = [{"title": "a", "value": None, "bits_per_token": 1.0}, {"title": "b", "value": 1, "bits_per_token": nan}]
    with pytest.raises(Damaged, match="b: nan bits per token lost"):
        allow(Plan((1,), Sizes(), max_damage=0.5), lines, "nothing is written")


def test_healing_is_measured_beside_a_control_healed_alike(tmp_path: Path, halved: str) -> None:
    out = tmp_path / "healed"
    assert run(halved, "--kv-heads", "2", "--heal", "2560", *SMALL, "--out", str(out)) == 0
    rows = json.loads((out / "conversion.json").read_text())["rows"]
    assert [row["title"] for row in rows] == [
        "original", "gqa 2, procrustes", "gqa 2, procrustes, healed", "control, healed",
    ]  # fmt: skip
    assert rows[2]["bits_per_token"] < rows[1]["bits_per_token"]
    assert sorted(tmp_path.iterdir()) == [out]  # nothing is left beside it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "mla2"], "--to 'mla2': want"),
        (["--to", "linformer"], "it has no causal form"),
        (["--to", "hedgehog", "--layers", "2-9"], "has layers 0 to 3, not 4"),
        (["--to", "hedgehog", "--layers", "x"], "want layers such as 4-20"),
        (["--to", "hedgehog", "--transfer", "-1"], "--transfer -1: want"),
        (["--to", "hedgehog", "--kv-heads", "2"], "--kv-heads belongs to --to gqa"),
        (["--to", "gqa", "--layers", "1"], "--layers belongs to a mechanism"),
        (["--to", "hedgehog", "--budget-bytes", "100"], "give --layers"),
        (["--kv-heads", "3"], "can be pooled into 1, 2, 4"),
        (["--kv-heads", "0"], "can be pooled into"),
        (["--rank", "8"], "--rank belongs to --to mla"),
        (["--to", "mla", "--align", "mean"], "--align belongs to --to gqa"),
        (["--to", "mla", "--rank", "100000"], "the full rank of LlamaForCausalLM"),
        (["--to", "mla", "--norm", "none"], "--norm 'none': want exact or fitted"),
        (["--budget-bytes", "3"], "the smallest cache here takes"),
        (["--budget-bytes", "3", "--kv-heads", "2"], "give one of them"),
        (["--kv-heads", "two"], "want a number, or several"),
        (["--kv-heads", "2,1"], "several are measured with --dry-run only"),
        (["--heal", "0"], "want a number of tokens such as 200k"),
        (["--heal", "1k", "--lr", "7"], "--lr 7.0: want a number between 0 and 1"),
        (["--align", "svd"], "--align 'svd': want one of"),
        (["--dtype", "int4"], "--dtype 'int4': want one of"),
        (["--windows", "0"], "--windows 0: want 1 to"),
        (["--max-damage", "nan"], "--max-damage nan: want bits per token"),
        (["--calibrate", "9000000"], "tokens for calibration in windows of 128; --calibrate 9000000 was asked"),
        (["a", "b"], "takes one"),
        (["check"], "takes one folder"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, *arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_conversion_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(*SMALL, "--out", str(tmp_path)) == 2
    assert "holds files that are no conversion" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    short = tmp_path / "short.txt"
    short.write_text("too short to measure on " * 8)
    assert run("--text", str(short), *SMALL, "--out", str(tmp_path / "new")) == 2
    assert "give a longer text" in capsys.readouterr().err


def test_a_stopped_healing_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model()
    questions = Questions(loaded, text=library_text(), seed=1)
    plan = Healing(tokens=6 * 2 * 128, length=128, batch=2)
    whole = heal(load_model().model, questions, plan)

    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str = "") -> None:
        if done == 4:
            raise Killed

    monkeypatch.setattr(loop_module, "KEEP_EVERY", 0.0)
    keep = tmp_path / "kept"
    with pytest.raises(Killed):
        heal(load_model().model, questions, plan, keep=keep, tell=stop)
    assert (tmp_path / "kept.safetensors").is_file()
    seen: list[int] = []
    again = heal(load_model().model, questions, plan, keep=keep, tell=lambda done, total, text: seen.append(done))
    assert seen[0] == 4
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    forget(keep)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_late_does_nothing_again(
    tmp_path: Path, halved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the control is measured, when the conversion is healed."""
    steps: list[int] = []
    measure, train = Judge.measure, healing_module.batch

    def counted(*given: Any) -> torch.Tensor:
        steps.append(given[2])
        return train(*given)

    def killed(self: Judge, model: Any, tell: Any = None) -> dict[str, Any]:
        if len(steps) > 2:
            raise KeyboardInterrupt
        return measure(self, model)

    monkeypatch.setattr(healing_module, "batch", counted)
    monkeypatch.setattr(Judge, "measure", killed)
    asked = [halved, "--kv-heads", "4", "--heal", "2560", *SMALL, "--out", str(tmp_path / "out")]
    assert run(*asked) != 0
    assert steps == [0, 1, 0, 1]
    monkeypatch.setattr(Judge, "measure", measure)
    assert run(*asked) == 0
    assert steps == [0, 1, 0, 1]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]


def test_batches_follow_from_the_seed_and_half_end_in_a_key() -> None:
    loaded = load_model()
    questions = Questions(loaded, text=library_text(), seed=1)
    plan = Healing(tokens=1, length=160, batch=40)
    torch.testing.assert_close(batch(questions, plan, 3), batch(questions, plan, 3))
    ends = [loaded.decode(row.tolist())[-30:] for row in batch(questions, plan, 3)]
    assert 10 <= sum("pass key is" in end for end in ends) <= 30


def test_text_that_is_measured_is_not_learnt_from() -> None:
    from manyheads.hosts.questions import held_out

    lines: Any = {line for line in held_out().split("\n") if len(line) > 60}
    shared = lines & set(library_text().split("\n"))
    assert len(shared) < 0.02 * len(lines)  # licence notes
