"""Loading: the packaged model works as its card says, and folders that cannot be used are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyheads.cli import main
from manyheads.hosts.loading import BUNDLED, Loaded, load_any, load_model

QUESTION = "\nWhat is the pass key? The pass key is "


def test_the_packaged_model_answers_a_passkey_and_takes_little_room() -> None:
    loaded = load_model()
    filler = Path(json.__file__).read_text()[:960]
    prompt = filler[:300] + "\nThe pass key is 40718. Remember it.\n" + filler[300:] + QUESTION
    ids = torch.tensor([loaded.encode(prompt)])
    out = loaded.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert ids.shape[1] > 1024
    assert loaded.decode(out[0, -5:].tolist()) == "40718"
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) < 5e6
    assert not loaded.model.training
    assert (BUNDLED / "README.md").read_text().count("bits per byte") == 1


def test_bytes_are_tokens() -> None:
    loaded = load_model()
    assert loaded.encode("é!") == [0xC3, 0xA9, 0x21]
    assert loaded.decode([0xC3, 0xA9, 0x21]) == "é!"
    assert loaded.tokens([65, 10, 0xC3]) == ["A", "\n", "\\xc3"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(BUNDLED, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_a_name(copied: Path) -> None:
    loaded = load_model(copied)
    assert loaded.name == str(copied)
    assert loaded.encode("é!") == [0xC3, 0xA9, 0x21]
    assert loaded.config.num_hidden_layers == 4


def test_what_is_refused(copied: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(copied.parent)
    with pytest.raises(ValueError, match="is a file"):
        load_model(copied / "config.json")
    with pytest.raises(ValueError, match="does not exist"):
        load_model("./nothing/here")
    (copied / "model.safetensors").write_bytes(b"no tensors" * 100)
    with pytest.raises(ValueError, match="damaged"):
        load_model(copied)


def test_pickles_are_not_read(copied: Path) -> None:
    """A checkpoint that has only a pickle is refused, whatever it holds."""
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    save_file(tensors, copied / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"no model\.safetensors but pytorch_model\.bin, a pickle, which is never read"
    ):
        load_model(copied)


def test_a_folder_that_is_none_yet_says_what_to_give(copied: Path) -> None:
    """What peft and Trainer write looks like a model to who gives it."""
    with pytest.raises(ValueError, match=r"do you mean .*model"):
        load_model(copied.parent)
    (copied / "config.json").unlink()
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        load_model(copied)


def changed(folder: Path, **entries: object) -> Path:
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(kept | entries))
    return folder


@pytest.mark.parametrize("load", [load_model, load_any])
def test_code_of_a_checkpoint_is_refused_by_name(copied: Path, load: Callable[[Path], Loaded]) -> None:
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    changed(copied, auto_map=code, model_type="own", architectures=["OwnForCausalLM"])
    (copied / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ValueError, match=r"own is never run: give a checkpoint|such code is never run") as told:
        load(copied)
    assert "trust_remote_code" not in str(told.value)


def test_a_package_that_is_missing_is_no_damage(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wants(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'optimum.gptq'")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", wants)
    with pytest.raises(ValueError, match=r"wants a package that is not installed: .*optimum\.gptq"):
        load_model(copied)


@pytest.mark.parametrize("load", [load_model, load_any])
def test_a_misspelt_name_is_in_the_error(load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers tells of a connection, and not of which of its arguments was no folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="smolm2 is no folder here"):
        load("smolm2")


def test_tokens_that_the_model_has_no_embedding_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after add_tokens without resize_token_embeddings."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **tiny)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.encode("old") == list(b"old")
    with pytest.raises(ValueError, match="gives token 256 and its model has 256 embeddings"):
        loaded.encode("a <new> one")
    for line in ("explain --text", "steer --with boost --span <new> --text"):  # which ask the tokenizer themselves
        verb, *options = line.split()
        with pytest.raises(SystemExit) as stopped:
            main([verb, str(tmp_path), *options, "a <new> one", "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert "its model has 256 embeddings" in capsys.readouterr().err


def test_a_model_that_needs_a_tokenizer_says_so(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **tiny)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        load_model(tmp_path)
