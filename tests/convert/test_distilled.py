"""Students: every other layer of a model, or another width; what is refused; and the command that teaches them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from manyheads.cli import main
from manyheads.convert.distilled import check_student, student
from manyheads.convert.healing import Healing
from manyheads.convert.hosted import hosted
from manyheads.convert.layout import FAMILIES, attentions
from manyheads.convert.methods import Distilled
from manyheads.hosts.loading import load_model

SMALL = ["--windows", "1", "--keys", "1", "--length", "160"]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 4,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.tensor([list(range(1, 41))])


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_half_the_layers_are_every_other_one(kind: str) -> None:
    """The student computes what the model computes when the others are passed by."""
    model = tiny(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    half = student(model, 2)
    assert half.config.num_hidden_layers == 2
    with torch.no_grad():
        own = half(ROWS, use_cache=False).logits
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        layers = model.get_decoder().layers
        for skipped in (layers[1], layers[3]):
            skipped.forward = lambda hidden_states, *args, **options: hidden_states
        torch.testing.assert_close(own, model(ROWS, use_cache=False).logits, rtol=1e-3, atol=1e-5)
    # Angles and, in some families, the scale of embeddings are float32.
    torch.testing.assert_close(student(tiny(kind), 4)(ROWS).logits, tiny(kind)(ROWS).logits, rtol=1e-3, atol=1e-5)


def test_half_of_a_converted_model_keeps_the_mechanisms_of_its_layers() -> None:
    model = hosted(tiny("llama"), {"name": "mswa", "window": 8}, (0, 1, 3))
    half = student(model, 2)
    assert [spec["name"] for spec in half.config.layers] == ["mswa", "softmax"]
    for i, at in enumerate((0, 2)):
        kept, own = (each.model.stack.layers[k].state_dict() for each, k in ((model, at), (half, i)))
        torch.testing.assert_close(dict(own), dict(kept), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"ManyheadsForCausalLM .* has no converter for its layout"):
        check_student(model, 2, 16)
    with pytest.raises(ValueError, match="has no converter for its layout"):
        Distilled(teaching=Healing(1, form="relations")).check(model, 2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_width_has_heads_of_the_same_size(kind: str) -> None:
    model = tiny(kind)
    narrow = student(model, 3, 16)
    own = attentions(narrow)[2]
    assert own.projections()["q_proj"].weight.shape == (16, 16)
    assert own.projections()["k_proj"].weight.shape == (8, 16)
    assert own.head_dim == 4
    assert narrow.config.intermediate_size == 12
    assert narrow(ROWS).logits.shape == (1, 40, 48)
    torch.rand(3)
    for a, b in zip(narrow.parameters(), student(model, 3, 16).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_no_student() -> None:
    model = tiny("llama")
    for depth in (0, 5):
        with pytest.raises(ValueError, match=f"--depth {depth}: LlamaForCausalLM has 4 layers; want 1 to 4"):
            check_student(model, depth)
    with pytest.raises(ValueError, match="--width 20: heads and layers of LlamaForCausalLM scale to"):
        check_student(model, 2, 20)


def test_a_student_learns_relations_and_expectations(tmp_path: Path) -> None:
    out = tmp_path / "student"
    arguments = ["--to", "distil", "--depth", "2", "--transfer", "2", "--heal", "2k", "--healing", "distil"]
    assert run(*arguments, *SMALL, "--out", str(out)) == 0
    record = json.loads((out / "conversion.json").read_text())
    assert [(row["title"], row["stage"]) for row in record["rows"]] == [
        ("original", "original"),
        ("2 layers", "right after"),
        ("2 layers, taught", "taught"),
        ("2 layers, healed", "healed"),
        ("2 layers, text alone", "control"),
    ]
    assert record["settings"]["teaching"]["form"] == "relations"
    assert record["rows"][3]["kl_bits"] < record["rows"][1]["kl_bits"]
    made = AutoModelForCausalLM.from_pretrained(out)
    assert (type(made).__name__, made.config.num_hidden_layers) == ("LlamaForCausalLM", 2)
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_student_of_its_own_is_measured_against_its_teacher(tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "student"
    student(load_model().model, 1, 64).save_pretrained(start)
    assert run(str(start), "--to", "distil", "--transfer", "1", *SMALL, "--dry-run", "--out", str(out)) == 2
    packaged = str(Path(load_model.__code__.co_filename).parent.parent / "bundled" / "byte_llama")
    given = [str(start), "--to", "distil", "--against", packaged, "--transfer", "1", "--dry-run"]
    assert run(*given, *SMALL, "--out", str(out)) == 0
    record = json.loads((out / "conversion.json").read_text())
    assert record["source"]["layers"] == 4
    assert [row["title"] for row in record["rows"]] == [
        "original",
        "1 layer",
        "1 layer, taught",
        "1 layer, text alone",
    ]
    assert record["rows"][1]["parameters"] < record["rows"][0]["parameters"] / 4
    assert record["rows"][1]["kl_bits"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "distil"], "nothing would teach the student"),
        (["--to", "distil", "--depth", "4", "--heal", "1k"], "the student would be the teacher"),
        (["--to", "distil", "--depth", "5", "--heal", "1k"], "has 4 layers; want 1 to 4"),
        (["--to", "distil", "--width", "77", "--heal", "1k"], "--width 77: heads and layers of"),
        (["--to", "distil", "--transfer", "-1"], "--transfer -1: want"),
        (["--to", "gqa", "--width", "64"], "--width belongs to --to distil"),
        (["--to", "gqa", "--depth", "2"], "--depth belongs to --to distil"),
        (["--to", "gqa", "--transfer", "2"], "--transfer belongs to a mechanism"),
        (["--healing", "lora"], "--heal TOKENS how long: give both"),
        (["--healing", "qlora", "--heal", "1k"], "--healing 'qlora': want one of full, lora, distil"),
        (["--against", "x", "--heal", "1k"], "--against x is a teacher, for --healing distil or --to distil"),
    ],
)
def test_what_a_command_line_cannot_ask(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMALL, *arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "teacher"
    tiny("llama", vocab_size=300).float().save_pretrained(folder)
    words = Tokenizer(WordLevel({"def": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    asked = ["--heal", "1k", "--healing", "distil", "--against", str(folder)]
    assert run(*SMALL, *asked, "--out", str(tmp_path / "out")) == 2
    assert f"--against {folder} has another tokenizer than byte_llama" in capsys.readouterr().err
