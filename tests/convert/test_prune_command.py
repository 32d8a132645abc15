"""`manyheads convert --to prune` as it is typed: heads over all layers, and as many in every one."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from manyheads.cli import main

SMALL = ["--to", "prune", "--windows", "1", "--keys", "1", "--length", "128", "--calibrate", "128"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    return int(end.value.code or 0)


def test_all_layers_compete_for_a_budget(tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    # 13 of 16 key/value heads: 64 numbers of 4 bytes each.
    arguments = ["--global", "--by", "normalised", "--budget-bytes", str(13 * 64 * 4), "--out", str(out)]
    assert run(*SMALL, *arguments) == 0
    record = json.loads((out / "conversion.json").read_text())
    assert record["title"] == "26 heads over all layers, by normalised"
    assert record["rows"][1]["cache_bytes"] == 13 * 64 * 4 * 128
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "ManyheadsForCausalLM"
    assert run("check", str(out)) == 0


def test_uniform_is_a_stock_class(tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    assert run(*SMALL, "--heads", "24", "--by", "alone", "--uniform", "--out", str(out)) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__module__.startswith("transformers.")
    assert model.config.num_attention_heads == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "25", "--global"], "over all layers it can keep 8 to 32, a multiple of 2"),
        (["--heads", "25"], "alike in every layer it can keep"),
        (["--heads", "24", "--by", "size"], "--by 'size': want one of importance, normalised, ablation, alone, greedy"),
        (["--by", "dimap"], "--by dimap are for image classifiers such as Swin"),
        (["--to", "gqa", "--global"], "--uniform belongs to --to prune"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, *arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
