"""A folder of odd files: what a command may be given by mistake or by malice."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = {
    "empty": b"", "one": b"a", "blank": b" \n\t\n", "nul": b"\0" * 64, "binary": bytes(range(256)) * 40,
    "latin.txt": "Grüße".encode("latin-1"), "utf16.txt": "Some text".encode("utf-16"), "bom.txt": b"\xef\xbb\xbfa",
    "escape.txt": b"\x1b[2J\x1b]0;title\x07" * 9, "one-line.txt": b"word " * 4000, "text.txt": b"Some words.\n" * 400,
    "surrogate.txt": b"\xed\xa0\x80" * 8, "png.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "gif.gif": b"GIF89a" + b"\xff" * 20,
    "weights.gguf": b"GGUF" + b"\xff" * 64, "empty.gguf": b"", "pickle.bin": b"\x80\x04K\x01.",
}  # fmt: skip
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
YAML = {
    "empty": "", "null": "null", "list": "[1, 2]", "number": "7", "word": "quick", "broken": "a: [", "tab": "a:\n\t- b",
    "laughs": LAUGHS, "laughing": LAUGHS + "mechanisms: *a29\n", "deep": "[" * 50_000, "deeper": "mechanisms: " + "{a: " * 3000,
    "braces": "{" * 100_000, "dashes": "- " * 20_000, "self": "&a {mechanisms: *a}", "circle": "mechanisms: &a [*a]",
    "merge": "a: &a {b: 1}\nmechanisms: {<<: *a}", "merges": "a: &a {<<: *a}", "tag": "mechanisms: !!python/object/apply:os.system [x]",
    "binary": "mechanisms: !!binary aGVsbG8=", "set": "mechanisms: !!set {a, b}", "date": "mechanisms: [2020-01-01]",
    "huge": "seeds: [" + "9" * 6000 + "]", "hex": "seeds: [0x" + "f" * 6000 + "]", "sexagesimal": "seeds: [" + ":".join(["1"] * 9000) + "]", "nan": "speed: {limit_seconds: .nan}",
    "infinite": "training: {learning_rates: [.inf]}", "keys": "1: 2\nnull: 3\n[a]: 4", "complex": "? {a: 1}\n: b",
    "documents": "a: 1\n---\nb: 2", "twice": "seeds: [0]\nseeds: [1]", "unknown": "mechanism: [softmax]",
    "names": "mechanisms: [null, 1, [], {}, softmax]", "args": "mechanisms: [{name: moba, block: .nan}]",
    "nested": "mechanisms: [{name: softmax, args: {args: {args: 1}}}]", "long": "mechanisms: [" + "softmax, " * 9000 + "]",
    "wide": "model: {hidden_size: 16777216, heads: 1}", "many": "seeds: [" + ", ".join(map(str, range(50_000))) + "]",
    "sizes": "speed: {lengths: [16777216]}", "zero": "speed: {heads: 0}", "preset": "preset: [quick]",
    "recipes": "recipes: {recall: 1}\ntasks: [recall]", "tasks": "tasks: [{name: recall, model: [1]}]",
    "task": "tasks: [{name: recall, n: 1.0e+30}]", "memory": "mechanisms: [{name: linformer, length: 1000000000000}]",
    "arguments": "arguments: 7", "model": "model: 7", "training": "training: {steps: x}", "surrogate": 'preset: "\\ud800"',
    "quick": "mechanisms: [softmax]\nsections: [speed]\nspeed: {lengths: [16], repeats: 1}",
}  # fmt: skip
JSON = {
    "empty": "", "null": "null", "list": "[]", "number": "7", "deep": "[" * 200_000, "braces": '{"a":' * 100_000,
    "nan": '{"a": NaN}', "huge": '{"sink_size": ' + "9" * 6000 + "}", "object": "{}", "text": '"x"', "cut": '{"model_type":',
    "surrogate": '{"model_type": "\\ud800"}', "twice": '{"a": 1, "a": 2}',
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "no-type": {"model_type": None}, "unknown": {"model_type": "no-such-model"}, "number": {"model_type": 7},
    "list": {"model_type": ["llama"]}, "gpt2": {"model_type": "gpt2"}, "bert": {"model_type": "bert"},
    "vit": {"model_type": "vit"}, "t5": {"model_type": "t5"}, "whisper": {"model_type": "whisper"},
    "zero-heads": {"num_attention_heads": 0}, "odd-heads": {"num_attention_heads": 3}, "kv": {"num_key_value_heads": 3},
    "no-layers": {"num_hidden_layers": 0}, "more-layers": {"num_hidden_layers": 3}, "minus": {"num_hidden_layers": -1},
    "wide": {"hidden_size": 64}, "word": {"hidden_size": "wide"}, "null": {"hidden_size": None}, "float": {"hidden_size": 16.5},
    "vocabulary": {"vocab_size": 0}, "large": {"vocab_size": 10**9}, "larger": {"hidden_size": 2**40}, "positions": {"max_position_embeddings": 0},
    "short": {"max_position_embeddings": 8}, "act": {"hidden_act": "no-such"}, "rope": {"rope_scaling": {"rope_type": "x"}},
    "rope-list": {"rope_scaling": [1]}, "rope-parameters": {"rope_parameters": 7}, "dtype": {"dtype": "float7"}, "architecture": {"architectures": ["NoSuch"]}, "architectures": {"architectures": 7},
    "architecture-word": {"architectures": "LlamaForCausalLM"}, "class": {"architectures": ["pipeline"]}, "private": {"architectures": ["__name__"]}, "trainer": {"architectures": ["Trainer"]},
    "code": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "quantised": {"quantization_config": {"quant_method": "no"}},
    "quantised-list": {"quantization_config": [1]}, "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "eos": {"eos_token_id": "x"}, "pad": {"pad_token_id": 10**6}, "head": {"head_dim": 0}, "manyheads": {"model_type": "manyheads"},
    "manyheads-layers": {"model_type": "manyheads", "layers": ["no-such"]}, "manyheads-args": {"model_type": "manyheads", "layers": [{"name": "moba", "block": "x"}]},
    "manyheads-mixed": {"model_type": "manyheads", "layers": 7, "architectures": ["ManyheadsForCausalLM"]},
    "attention": {"_attn_implementation": "no-such"}, "attn": {"attn_implementation": "flash_attention_2"}, "window": {"sliding_window": -1}, "nan": {"rms_norm_eps": float("nan")},
    "encoder": {"is_encoder_decoder": True}, "tie": {"tie_word_embeddings": "x"}, "generation": {"temperature": -1, "do_sample": True},
    "labels": {"id2label": 7}, "types": {"layer_types": ["x"]}, "nested": {"text_config": {"model_type": "llama"}},
}  # fmt: skip


def tiny_llama(folder: Path) -> Path:
    """A healthy checkpoint of bytes: 2 layers of width 16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _variants(root: Path, good: Path) -> None:
    config = json.loads((good / "config.json").read_text())

    def copied(name: str) -> Path:
        return Path(shutil.copytree(good, root / name))

    for name, change in CONFIGS.items():
        (copied(f"config-{name}") / "config.json").write_text(json.dumps({**config, **change}))
    for name, text in JSON.items():
        (copied(f"json-{name}") / "config.json").write_text(text)
        (copied(f"generation-{name}") / "generation_config.json").write_text(text)
        (copied(f"tokenizer-{name}") / "tokenizer.json").write_text(text)
        (copied(f"tokens-{name}") / "tokenizer_config.json").write_text(text)
        (copied(f"index-{name}") / "model.safetensors").unlink()
        (root / f"index-{name}" / "model.safetensors.index.json").write_text(text)
    whole = (good / "model.safetensors").read_bytes()
    cuts = {"empty": b"", "few": whole[:7], "header": whole[:60], "half": whole[: len(whole) // 2], "last": whole[:-1],
            "more": whole + b"x", "long": struct.pack("<Q", 2**62) + whole[8:], "noise": bytes(range(256)) * 99,
            "deep": struct.pack("<Q", 200_000) + b"[" * 200_000, "pickle": b"\x80\x04K\x01."}  # fmt: skip
    for name, content in cuts.items():
        (copied(f"weights-{name}") / "model.safetensors").write_bytes(content)
    (copied("weights-none") / "model.safetensors").unlink()
    shutil.move(copied("weights-bin") / "model.safetensors", root / "weights-bin" / "pytorch_model.bin")
    (copied("weights-folder") / "model.safetensors").unlink()
    (root / "weights-folder" / "model.safetensors").mkdir()
    (root / "config-folder" / "config.json").mkdir(parents=True)
    outside = {"metadata": {}, "weight_map": {"lm_head.weight": "../../../etc/passwd"}}
    (root / "index-null" / "model.safetensors.index.json").write_text(json.dumps(outside))


def corner(root: Path) -> dict[str, list[str]]:
    """Makes the files under `root`; names by what they are taken for: texts, yaml, models, folders, files."""
    good = tiny_llama(root / "model")
    made: dict[str, list[str]] = {"models": [], "texts": [], "yaml": [], "profiles": []}
    for name, content in BYTES.items():
        (root / name).write_bytes(content)
    for name, text in YAML.items():
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
        made["yaml"].append(str(root / f"{name}.yaml"))
    _variants(root / "models", good)
    (root / "folder").mkdir()
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    with (root / "sparse.txt").open("wb") as file:
        file.truncate(1 << 36)
    closed = root / "closed.txt"
    closed.write_text("text")
    closed.chmod(0)
    for name, text in JSON.items():
        folder = root / "profiles" / name
        folder.mkdir(parents=True)
        (folder / "heads.json").write_text(text)
        duo = root / "profiles" / f"duo-{name}"
        duo.mkdir()
        (duo / "config.json").write_text(text)
        (duo / "full_attention_heads.tsv").write_bytes(BYTES["binary"] if name < "h" else b"0.5\t0.5\n0.5\t0.5\n")
        cut = root / "profiles" / f"cut-{name}"
        cut.mkdir()
        (cut / "heads.safetensors").write_bytes(text[:99].encode())
    made["profiles"] = [str(path) for path in sorted((root / "profiles").iterdir())]
    odd = [
        str(root / name)
        for name in (*BYTES, "folder", "loop", "dangling", "pipe", "sparse.txt", "closed.txt", "nowhere")
    ]
    devices = [
        "/dev/zero",
        "/dev/null",
        "/dev/full",
        "/dev/urandom",
        "/proc/self/mem",
        "/proc",
        "/",
        ".",
        "..",
        "",
        " ",
        "~",
        "-",
    ]
    strange = [
        "a" * 300,
        "/".join(["a"] * 2000),
        "x\ny",
        "x\x1b[2J",
        "\ud800",
        "x\0y",
        "//",
        "../" * 500,
        "org/model/../x",
        "C:\\x",
        "ü&?#%",
    ]
    made["paths"] = [*odd, *devices, *strange]
    made["models"] = [str(good), *(str(path) for path in sorted((root / "models").iterdir()))]
    return made
