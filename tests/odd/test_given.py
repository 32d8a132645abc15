"""Text, JSON and YAML from outside: what is too much is refused before it is read or parsed."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from corners import JSON, LAUGHS, YAML, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scale import SEED, TIMES

from manyheads.compare.experiment import create_experiment, read_experiment
from manyheads.hosts.loading import load_any, load_model
from manyheads.runs.given import MOST_DEPTH, MOST_ITEMS, parse_json, parse_yaml, read_bytes, read_text
from manyheads.runs.names import parse_name

PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=5))
TREE = st.recursive(PLAIN, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4))


def odd(examples: int) -> settings:
    slow = list(HealthCheck)
    return settings(
        max_examples=examples * TIMES, deadline=None, derandomize=SEED == 0, database=None, suppress_health_check=slow
    )


def refusal(call: Callable[[], object]) -> str | None:
    """What is said by a call that is refused; None where it is not. Other errors than ValueError come through."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


KEYS = ["preset", "mechanisms", "tasks", "seeds", "sections", "model", "training", "speed", "memory", "decode",
        "device", "precision", "recipes", "arguments", "x"]  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_odd_yaml_is_an_experiment_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(YAML[name], encoding="utf-8")
    begun = time.monotonic()
    said = refusal(lambda: create_experiment(read_experiment(path), where=str(path)))
    assert said is None or ("experiment.yaml" in said and len(said) < 4000)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "more than 20,000 items"),
        ("&a [*a]", "is used within itself"),
        ("a: &a {b: {c: *a}}", "is used within itself"),
        ("[" * (MOST_DEPTH + 1), "nested deeper"),
        ("- " * 100_000, "nested deeper"),
        ("x: " + "1:" * 5000 + "1", "put a long text into quotes"),
        ("[" + "1," * (MOST_ITEMS + 1) + "]", "more than 20,000 items"),
        (" " * 256_001, "at most 256,000"),
        ("!!timestamp x", "does not fit its tag"),
        ("!!bool x", "does not fit its tag"),
        ("!!int x", "does not fit its tag"),
        ("2020-13-13", "does not fit its tag"),
        ("[*b]", "undefined alias"),
    ],
)
def test_yaml_is_bounded_before_it_is_built(text: str, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=words) as raised:
        parse_yaml(text, "the text")
    assert "the text" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - begun < 10


def test_anchors_may_repeat() -> None:
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}", "") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    assert parse_yaml("&a 1", "") == 1


@pytest.mark.parametrize(
    "name",
    [name for name in JSON if name not in ("null", "list", "number", "object", "text", "nan", "twice", "surrogate")],
)
def test_json_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"the text is (not JSON|nested too deep)"):
        parse_json(JSON[name], "the text")


def test_pipes_and_devices_are_read_no_further_than_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "pipe", most=9) == b""
    for path in ("/dev/zero", "/dev/urandom"):
        with pytest.raises(ValueError, match="has more than 1,000 bytes"):
            read_text(path, most=1000)
    assert read_text("/dev/null") == ""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="has more than 64,000,000 bytes"):
        read_text(tmp_path / "sparse")
    read, write = os.pipe()
    os.write(write, b"words")
    os.close(write)
    assert read_text(f"/dev/fd/{read}", what="--text") == "words"
    os.close(read)
    with pytest.raises(ValueError, match=r"--text .*nowhere cannot be read \(No such file"):
        read_text(tmp_path / "nowhere", what="--text")


@odd(200)
@given(st.text(max_size=200) | TREE.map(lambda tree: json.dumps(tree, default=str)))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        said = refusal(lambda parse=parse: parse(text, "the text"))  # type: ignore[misc]
        assert said is None or "the text" in said


@odd(200)
@given(
    st.from_regex(r"[a-z]{1,4}(\[([a-z]{0,3}=?[0-9a-z.\[\]{}&*!\"'-]{0,6},?){0,3}\]?)?", fullmatch=True)
    | st.text(max_size=30)
)
def test_any_name_is_parsed_or_refused(text: str) -> None:
    try:
        found = parse_name(text)
    except ValueError:
        return
    assert found == text or isinstance(found["name"], str)


@odd(50)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), TREE, max_size=4))
def test_any_mapping_is_an_experiment_or_refused(changes: dict[str, object]) -> None:
    assert (refusal(lambda: create_experiment(changes)) or "experiment: ").startswith("experiment: ")


MECHANISM = st.fixed_dictionaries(
    {"name": st.sampled_from(["softmax", "moba", "linformer", "titans"])},
    optional=dict.fromkeys(("block", "top_k", "heads", "dim", "rotary", "bias", "args"), PLAIN),
)
TASK = st.fixed_dictionaries(
    {"name": st.sampled_from(["recall", "text", "digits-grid"])},
    optional=dict.fromkeys(("n", "pairs", "model", "training"), PLAIN | TREE),
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "mechanisms": st.lists(st.sampled_from(["softmax", "moba", "gqa"]) | MECHANISM | TREE, max_size=3),
        "tasks": st.lists(st.just("recall") | TASK, max_size=2),
        "model": st.dictionaries(st.sampled_from(["layers", "heads", "hidden_size", "positions"]), PLAIN, max_size=3),
        "speed": st.dictionaries(st.sampled_from(["lengths", "heads"]), PLAIN | st.lists(PLAIN, max_size=2)),
        "seeds": st.lists(PLAIN, max_size=3) | PLAIN,
    },
)


@odd(50)
@given(SETTINGS)
def test_settings_are_taken_or_refused(changes: dict[str, object]) -> None:
    assert (refusal(lambda: create_experiment(changes)) or "experiment: ").startswith("experiment: ")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for load in (load_model, load_any):
        with pytest.raises(ValueError, match=r"no weights for model.layers.2.* and 8 more"):
            load(folder)


@pytest.mark.parametrize("architectures", [7, "LlamaForCausalLM", [7], ["pipeline"], ["__name__"], ["NoSuch"]])
def test_architectures_that_are_no_model(tmp_path: Path, architectures: object) -> None:
    folder = tiny_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match=r"architectures|no model class"):
        load_any(folder)


def test_a_picture_is_bounded_too(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from manyheads.explain.explanation import explain_image

    torch.manual_seed(0)
    small = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    ViTForImageClassification(small).save_pretrained(tmp_path / "vit")
    loaded = load_any(tmp_path / "vit")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=r"bytes|no image that can be read"):
            explain_image(loaded, path)
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [1]}')
    (tmp_path / "p.png").write_bytes(b"")


def test_marks_of_an_editor_are_no_part_of_a_text(tmp_path: Path) -> None:
    """As Python's own open() reads them, which is what anybody compares with: each was a token of its own."""
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.\rThree.\n")
    assert read_text(path) == path.read_text(encoding="utf-8-sig") == "One.\nTwo.\nThree.\n"
