"""`manyheads convert --to mla` as it is typed: rotary features, folds, formats, and the rank that a budget leaves."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from manyheads.cli import main

SMALL = ["--to", "mla", "--windows", "1", "--keys", "1", "--length", "128", "--calibrate", "256"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *SMALL, *arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("format", "name"), [("youtu", "YoutuForCausalLM"), ("manyheads", "ManyheadsForCausalLM")]
)  # fmt: skip
def test_a_budget_leaves_a_rank_beside_the_rotary_features(format: str, name: str, tmp_path: Path) -> None:
    out = tmp_path / "mla"
    arguments = ["--rope-dim", "16", "--fold", "2", "--budget-bytes", "1024", "--format", format, "--out", str(out)]
    assert run(*arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == name
    record = json.loads((out / "conversion.json").read_text())
    # 1024 bytes are 64 numbers in each of 4 layers: 16 rotary, one constant, 47 of the latent.
    assert record["title"].startswith("mla 47, 16 rotary, fold 2, exact norm")
    assert record["rows"][1]["cache_bytes"] == 1024 * 128
    assert main_check(out) == 0


def main_check(folder: Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", "check", str(folder)])
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rope-dim", "24"], "--rope-dim 24: want an even divisor of LlamaForCausalLM's head size 32"),
        (["--fold", "3"], "--fold 3: want a divisor"),
        (["--fold", "most"], "--fold 'most': want a number of frequencies, or auto"),
        (["--format", "gguf"], "--format 'gguf': want one of deepseek_v3, youtu, manyheads"),
        (["--rope-dim", "16", "--budget-bytes", "256"], "the smallest cache here takes 72"),
        (["--to", "gqa", "--rope-dim", "16"], "--rope-dim belongs to --to mla"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
