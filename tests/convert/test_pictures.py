"""`manyheads convert SWIN --to prune`: a folder that opens, what it cost on images, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dimap import tiny
from transformers import AutoModelForImageClassification

from manyheads.cli import main
from manyheads.convert import load_dimap, pictures
from manyheads.convert.dimap import dimap
from manyheads.tasks.digits import split


@pytest.fixture
def swin(tmp_path: Path) -> Path:
    tiny(num_labels=10).float().save_pretrained(tmp_path / "swin")
    return tmp_path / "swin"


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, " ".join(err.split())


def test_weights_go_and_the_class_stays(capsys: pytest.CaptureFixture[str], swin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, told, _ = convert(capsys, swin, "--to", "prune", "--by", "dimap", "--sparsity", 0.5, "--out", out)
    assert code == 0
    assert "on 128 of scikit-learn's digits" in told
    source = AutoModelForImageClassification.from_pretrained(swin)
    made = AutoModelForImageClassification.from_pretrained(out)
    wanted = dimap(source, 0.5)
    images, labels = pictures.digits(source.config)
    assert images.shape == (128, 3, 16, 16)
    held, classes = split()[1]
    torch.testing.assert_close(labels, classes[:128])
    same = torch.nn.functional.interpolate(held[:128, None].float() / 8 - 1, (16, 16), mode="bilinear")
    torch.testing.assert_close(images[:, 0], same[:, 0])
    with torch.no_grad():
        logits = made(images).logits
        torch.testing.assert_close(logits, wanted(images).logits)
        whole = source(images).logits
    record = json.loads((out / "conversion.json").read_text())
    before, after = record["rows"]
    assert (before["kl_bits"], before["top_agreement"], before["zeros"]) == (0.0, 1.0, 0)
    counted = list(pictures.weight_scores(made))
    assert after["zeros"] == sum(int((made.get_parameter(name) == 0).sum()) for name in counted) > 0
    apart = (whole.double().log_softmax(1).exp() * (whole.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    assert after["kl_bits"] == pytest.approx(float(apart) / 0.6931471805599453, rel=1e-3)
    assert after["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert "resized" in (out / "conversion.html").read_text()
    assert convert(capsys, "check", out)[0] == 0
    made.classifier.bias.data += 1
    made.save_pretrained(out)
    assert convert(capsys, "check", out)[0] == 1


def test_heads_go_from_the_weights(capsys: pytest.CaptureFixture[str], swin: Path, tmp_path: Path) -> None:
    """2 + 4 + 4 heads; seven stay."""
    out = tmp_path / "out"
    code, told, _ = convert(capsys, swin, "--to", "prune", "--heads", 7, "--out", out, "--json")
    assert code == 0
    rows = json.loads(told)["rows"]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    made, source = load_dimap(out), AutoModelForImageClassification.from_pretrained(swin)
    assert sum(made.config.heads_kept) == 7
    images, _ = pictures.digits(made.config)
    with torch.no_grad():
        torch.testing.assert_close(made(images).logits, dimap(source, 0.3, structure="heads")(images).logits)
    assert json.loads((out / "conversion.json").read_text())["identities"][0]["gap"] < 1e-5
    assert convert(capsys, "check", out)[0] == 0
    with pytest.raises(RuntimeError):  # transformers alone does not draw the rest at random
        AutoModelForImageClassification.from_pretrained(out)


def test_a_cut_that_is_wrong_is_refused(swin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(num_labels=10)
    monkeypatch.setattr(pictures, "kept_heads", lambda model, share: [[0], [0], [0]])
    with pytest.raises(RuntimeError, match="a bug of manyheads"):
        pictures.proved(model, pictures.Thinned(heads=7))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "gqa"], "is an image classifier, and --to gqa takes a language model: want --to prune"),
        (["--to", "prune", "--by", "greedy"], "--by greedy asks for text"),
        (["--to", "prune", "--heal", "1k"], "--heal does not go with"),
        (["--to", "prune", "--heads", 2], "each of which keeps one: want 3 to 10"),
        (["--to", "prune", "--heads", 4, "--sparsity", 0.5], "give one of them"),
        (["--to", "prune", "--sparsity", 1], "want a share of the weights from 0"),
        (["--to", "prune", "--sparsity", 0.9, "--max-damage", 1e-9], "more than --max-damage"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], swin: Path, tmp_path: Path, arguments: list[Any], words: str
) -> None:
    code, _, err = convert(capsys, swin, *arguments, "--out", tmp_path / "out")
    assert code == (3 if "--max-damage" in arguments else 2)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_language_model_has_no_sparsity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for given in (["--sparsity", "0.5"], ["--by", "dimap"]):
        code, _, err = convert(capsys, "--to", "prune", *given, "--out", tmp_path / "out")
        assert code == 2
        assert "are for image classifiers such as Swin, and byte_llama is a LlamaForCausalLM" in err
