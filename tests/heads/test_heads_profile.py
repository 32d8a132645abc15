"""Profiles and the two repositories' files: round trips, their exact layouts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from written_heads import random_llama

from manyheads.heads import (
    DuoPattern,
    Fingerprint,
    Profile,
    fingerprint,
    read_duo,
    read_retrieval,
    write_duo,
    write_retrieval,
)
from manyheads.shrink import Duo

PRINT = Fingerprint("tiny", 2, 4, 2, "0123456789abcdef")


def profile() -> Profile:
    made = Profile(PRINT)
    made.add("echo", torch.arange(8.0).view(2, 4) / 8, {"length": 128})
    made.add("gates", torch.tensor([[0.0, 1.0], [0.25, 0.5]]), {"length": 128, "steps": 3})
    made.add("influence", torch.randn(3, 2, 2, 4), {"spans": [{"alpha": 8, "beta": 0.0}]})
    return made


@pytest.mark.parametrize("file", ["", "heads.safetensors", "heads.json"])
def test_a_profile_comes_back(tmp_path: Path, file: str) -> None:
    made = profile()
    made.save(tmp_path)
    found = Profile.load(tmp_path / file)
    assert (found.model, found.settings) == (made.model, made.settings)
    assert found.scores.keys() == made.scores.keys()
    for name, values in made.scores.items():
        torch.testing.assert_close(found.scores[name], values, rtol=0, atol=0)


def test_the_files_say_whose_and_how_to_index(tmp_path: Path) -> None:
    profile().save(tmp_path)
    told = json.loads((tmp_path / "heads.json").read_text())
    assert told["model"] == {"name": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "weights": PRINT.weights}
    assert "count from 0" in told["indexing"]
    assert told["scores"]["echo"][1][3] == 7 / 8
    assert load_file(tmp_path / "heads.safetensors")["gates"].tolist() == [[0.0, 1.0], [0.25, 0.5]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "heads.safetensors"]


def test_top_heads() -> None:
    made = profile()
    assert made.top("echo", 2) == [(1, 3, 7 / 8), (1, 2, 6 / 8)]
    assert made.top("gates", 3) == [(0, 1, 1.0), (1, 1, 0.5), (1, 0, 0.25)]
    made.scores["influence"] = torch.zeros(3, 2, 2, 4)
    made.scores["influence"][0, :, 1, 2] = torch.tensor([1.0, 3.0])
    made.scores["influence"][1, :, 0, 0] = 9.0
    assert made.top("influence", 1) == [(1, 2, 2.0)]


def test_fingerprints_tell_weights_apart_and_not_dtypes() -> None:
    loaded = random_llama()
    own = fingerprint(loaded.model, "a")
    assert (own.layers, own.heads, own.kv_heads) == (3, 6, 3)
    assert fingerprint(random_llama().model.to(torch.bfloat16), "b").differences(own) == []
    with torch.no_grad():
        loaded.model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    assert "weights" in fingerprint(loaded.model, "a").differences(own)[0]


def test_another_models_profile_is_refused(tmp_path: Path) -> None:
    model, other = random_llama().model, random_llama(num_hidden_layers=2).model
    made = Profile(fingerprint(model, "one"))
    made.add("sink", torch.zeros(3, 6), {})
    made.save(tmp_path)
    Profile.load(tmp_path, model)
    with pytest.raises(ValueError, match=r"another model \(one\).*layers 3 and 2"):
        Profile.load(tmp_path, other)
    with pytest.raises(ValueError, match=r"sink of shape \(2, 6\) does not fit 3 layers of 6 heads"):
        made.add("sink", torch.zeros(2, 6), {})


# A pickle that divides by zero when it is loaded.
BOMB = b"cbuiltins\neval\n(S'1 / 0'\ntR."


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 40, b"{}", BOMB, b"cut"],
    ids=["empty", "zeros", "json", "pickle", "cut"],
)
@pytest.mark.parametrize("file", ["heads.safetensors", "heads.json"])
def test_damaged_profiles_are_refused(tmp_path: Path, file: str, content: bytes) -> None:
    profile().save(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-9] if content == b"cut" else content)
    with pytest.raises(ValueError, match="is not a head profile that can be read"):
        Profile.load(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Profile.load(tmp_path)


# Files as the repositories write them: numpy.savetxt with tabs, json.dump on one line.
TSV = (
    "-9.584426879882812500e-05\t1.000000000000000000e+00\n"
    "5.585937500000000000e-01\t2.021789550781250000e-04\n"
    "1.000488281250000000e+00\t7.343750000000000000e-01\n"
)
CONFIG = '{"model_name": "models/Some-7B", "lr": 0.02, "sink_size": 128, "recent_size": 256, "deploy_sink_size": null}'
HEAD_SCORE = '{"0-0": [0, 0, 0.5], "0-1": [0, 0.25, 0], "1-0": [1.0, 0.75, 0.5], "1-1": [0, 0, 0]}'


def test_a_duo_pattern_from_its_repository(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(TSV)
    (tmp_path / "config.json").write_text(CONFIG)
    pattern = read_duo(tmp_path)
    assert (pattern.model_name, pattern.sink_size, pattern.recent_size) == ("models/Some-7B", 128, 256)
    assert pattern.gates.tolist() == [[0.0, 1.0], [0.55859375, 2.021789550781250000e-04], [1.0, 0.734375]]
    write_duo(tmp_path / "again", DuoPattern(pattern.gates, 64, 32, pattern.config))
    lines = (tmp_path / "again" / "full_attention_heads.tsv").read_text().splitlines()
    assert lines[1] == TSV.splitlines()[1]
    assert lines[0] == "0.000000000000000000e+00\t1.000000000000000000e+00"
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert told == json.loads(CONFIG) | {"sink_size": 64, "recent_size": 32}
    assert Duo.read_gates(tmp_path / "again" / "full_attention_heads.tsv") == pattern.gates.tolist()


def test_head_scores_from_their_repository(tmp_path: Path) -> None:
    path = tmp_path / "some-7b.json"
    path.write_text(HEAD_SCORE)
    scores = read_retrieval(path)
    assert scores.tolist() == [[[0, 0, 0.5], [0, 0.25, 0]], [[1.0, 0.75, 0.5], [0, 0, 0]]]
    write_retrieval(tmp_path / "again.json", scores)
    text = (tmp_path / "again.json").read_text()
    assert "\n" not in text  # their reader takes the first line
    assert json.loads(text) == json.loads(HEAD_SCORE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "one list per head"),
        ("{}", "one list per head"),
        ('{"0_0": [1]}', "no 'layer-head'"),
        ('{"0-0": 1}', "no 'layer-head'"),
        ('{"0-0": [1], "1-1": [1]}', "2 heads with"),
        ('{"0-0": [1], "0-1": [1, 2]}', r"\[1, 2\] scores"),
        ('{"0-0": ["x"]}', "could not convert"),
        ("{", "Retrieval_Head"),
    ],
)
def test_head_scores_that_cannot_be_read(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_retrieval(path)


@pytest.mark.parametrize(
    ("tsv", "config", "words"),
    [
        (TSV, "{", "is not a DuoAttention config"),
        (TSV, '{"sink_size": 4}', "recent_size"),
        (TSV, '{"sink_size": 4, "recent_size": -1}', "whole numbers"),
        ("1\t2\n3\n", CONFIG, "columns"),
        ("a\tb\n", CONFIG, "not a table of gates"),
        ("nan\t1\n", CONFIG, "not finite"),
        (None, CONFIG, "has no full_attention_heads.tsv"),
    ],
)
def test_duo_patterns_that_cannot_be_read(tmp_path: Path, tsv: str | None, config: str, words: str) -> None:
    if tsv is not None:
        (tmp_path / "full_attention_heads.tsv").write_text(tsv)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=words):
        read_duo(tmp_path)
