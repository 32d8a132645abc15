"""Loading: the packaged model works as its card says, and folders that cannot be used are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyheads.hosts.loading import BUNDLED, load_model

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
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        load_model(copied)


def test_a_model_that_needs_a_tokenizer_says_so(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **tiny)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        load_model(tmp_path)
