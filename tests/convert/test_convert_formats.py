"""What is written: file by file, in the source's dtype, its tokenizer beside it, whole or not at all; refusals."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert import as_mistral, grouped
from manyheads.convert.pruned import cut, kept_heads, pruned
from manyheads.convert.saving import check_conversion
from manyheads.convert.streamed import Cutting, Pooling, stream
from manyheads.hosts.loading import BUNDLED, load_model

SMALL = ["--windows", "1", "--keys", "2", "--length", "160", "--calibrate", "320"]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 3,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": 8,
}  # fmt: skip
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("phi3", {}),
    ("gemma3_text", {}),
]
IDS = [f"{kind}-{i}" for i, (kind, _) in enumerate(FAMILIES)]
# With biases, with one matrix for all three projections, with norms of heads: in every way. The others in two.
EVERY_WAY = ("llama-0", "phi3-5", "gemma3_text-6")


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).bfloat16().eval()


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    return int(end.value.code or 0)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("place", "kind", "more"), [(i, *own) for i, own in enumerate(FAMILIES)], ids=IDS)
def test_file_by_file_it_is_what_the_whole_model_becomes(
    place: int, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model, source = tiny(kind, **more), tmp_path / "source"
    model.save_pretrained(source, max_shard_size="12KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    before, scores = listing(source), torch.rand(3, 8)
    wholes = {
        "mean": (Pooling(2), grouped(model, 2, align="mean")),
        "groups": (Cutting(6, scores.tolist()), cut(model, kept_heads(model, 6, scores))),
    }
    if IDS[place] in EVERY_WAY:
        wholes |= {
            "first": (Pooling(1, "first"), grouped(model, 1, align="first")),
            "even": (Cutting(12, scores.tolist()), cut(model, kept_heads(model, 12, scores))),
        }
    for name, (change, whole) in wholes.items():
        stream(source, tmp_path / name, change)
        made = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (type(made), made.dtype) == (type(whole), torch.bfloat16)
        torch.testing.assert_close(dict(made.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
        ids = torch.arange(1, 20)[None]
        torch.testing.assert_close(made(ids).logits, whole(ids).logits, rtol=0, atol=0)
        assert check_conversion(tmp_path / name)["equal"]
    assert listing(source) == before


def test_by_the_command_and_a_changed_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, scores = tmp_path / "cut", tmp_path / "scores.json"
    scores.write_text(json.dumps(torch.rand(4, 8).tolist()))
    assert run("--stream", "--to", "prune", "--heads", "24", "--scores", str(scores), "--out", str(out)) == 0
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "MistralForCausalLM"
    assert run("check", str(out)) == 0
    told = capsys.readouterr().out
    assert "equal to what was written (by its files' hashes)" in told
    assert "CTranslate2: yes" in told
    assert (out / "tokenizer.json").read_bytes() == (BUNDLED / "tokenizer.json").read_bytes()
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert run("check", str(out)) == 1


def test_the_sources_dtype_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = load_model(dtype="bfloat16").model
    model.generation_config.temperature = 0.4
    model.generation_config.do_sample = True
    model.save_pretrained(source)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copyfile(file, source / file.name)
    assert run(str(source), "--align", "mean", "--kv-heads", "2", *SMALL, "--out", str(out)) == 0
    made = AutoModelForCausalLM.from_pretrained(out)
    assert made.dtype == torch.bfloat16
    assert made.generation_config.temperature == 0.4
    assert json.loads((out / "tokenizer.json").read_text())["model"]
    record = json.loads((out / "conversion.json").read_text())
    assert [held["claim"] for held in record["identities"]] == ["as many heads as before"]
    assert record["identities"][0]["gap"] < 2e-3
    found = check_conversion(out)
    assert (found["equal"], found["dtype"]) == (True, "bfloat16")
    assert run(str(source), "--align", "mean", "--dtype", "float32", *SMALL, "--out", str(tmp_path / "wide")) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_who_takes_it(tmp_path: Path) -> None:
    from manyheads.convert import hosted, latent
    from manyheads.convert.engines import takers

    model, rows = load_model().model, [list(range(200))]
    assert takers(hosted(model)) == {
        "transformers": "with manyheads installed",
        **dict.fromkeys(("CTranslate2", "vLLM", "llama.cpp"), "no: it has no ManyheadsForCausalLM"),
    }
    assert "hidden_size / heads" in takers(model)["CTranslate2"]
    assert takers(as_mistral(model))["CTranslate2"] == "yes"
    assert takers(latent(model, 96, calibration=rows))["vLLM"].startswith("no: it drops the bias")
    assert takers(latent(model, 96, norm="fitted", calibration=rows))["vLLM"] == "yes"
    ids = torch.arange(40)[None]
    torch.testing.assert_close(as_mistral(model)(ids).logits, model(ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no twin among Mistrals"):
        as_mistral(tiny("qwen3"))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    stream(BUNDLED, out, Pooling(2))
    before = listing(out)
    for arguments in (["--align", "mean", *SMALL], ["--stream"]):
        with files_up_to(1 << 20):
            assert run("--kv-heads", "1", *arguments, "--out", str(out)) != 0
        told = capsys.readouterr().err
        assert "the source model is untouched" in told, told
        assert "Traceback" not in told
        assert "Errno" not in told
        assert str(out) in told
        assert listing(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stop", ["save_file", "write_record"])
def test_a_conversion_that_was_stopped_leaves_nothing(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    where = "safetensors.torch" if stop == "save_file" else "manyheads.convert.streamed"
    monkeypatch.setattr(f"{where}.{stop}", killed)
    with pytest.raises(KeyboardInterrupt):
        stream(BUNDLED, tmp_path / "out", Pooling(2))
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    stream(BUNDLED, source, Pooling(2))
    before = listing(source)
    for more in (["--stream"], ["--align", "mean", *SMALL]):
        assert run(str(source), "--kv-heads", "1", *more, "--out", str(tmp_path / "." / "source")) == 2
        assert "is the folder of the model that is converted" in capsys.readouterr().err
    assert listing(source) == before


def broken(folder: Path, how: str) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    if how == "missing":
        shards[1].unlink()
    elif how == "cut off":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
    elif how == "no weights":
        for path in [*shards, folder / "model.safetensors.index.json"]:
            path.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "another shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 28}))
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        gone = index["weight_map"].pop("model.norm.weight")
        for path in shards:
            from safetensors.torch import load_file, save_file

            if path.name == gone:
                save_file({k: v for k, v in load_file(path).items() if k != "model.norm.weight"}, path)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "is half there"),
        ("cut off", "damaged or half-written"),
        ("no weights", "has neither model.safetensors nor"),
        ("no config", "no config.json"),
        ("another shape", "its layout is not the one"),
        ("a weight less", "has no weights for model.norm.weight"),
    ],
)
def test_a_half_written_folder_is_refused(
    how: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny().save_pretrained(source, max_shard_size="12KB")
    broken(source, how)
    assert run(str(source), "--stream", "--kv-heads", "2", "--out", str(out)) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "model-0000"),
        ("cut off", "damaged or not a checkpoint"),
        ("no weights", "model.safetensors"),
        ("no config", "config.json"),
        ("another shape", "damaged or not a checkpoint"),
        ("a weight less", "has no weights for model.norm.weight"),
    ],
)
def test_a_half_written_source_is_refused_as_a_whole_too(
    how: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny().save_pretrained(source, max_shard_size="12KB")
    broken(source, how)
    before = listing(source)
    assert run(str(source), "--kv-heads", "2", *SMALL, "--out", str(out)) in (1, 2)
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not out.exists()
    assert listing(source) == before


@pytest.mark.parametrize("what", ["shard", "cut shard", "record", "config"])
def test_check_of_a_half_written_folder(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder that was copied in part: it never says equal."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny().save_pretrained(source, max_shard_size="12KB")
    stream(source, out, Pooling(2))
    assert run("check", str(out)) == 0
    name = {"record": "conversion.json", "config": "config.json"}.get(what, sorted(out.glob("*.safetensors"))[1].name)
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[: len(whole) // 2])
    if what == "shard":
        (out / name).unlink()
    capsys.readouterr()
    assert run("check", str(out)) in (1, 2)
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert "; equal to what was written" not in told.out


@pytest.mark.parametrize("more", [["--stream"], SMALL])
def test_projections_fused_by_another_framework_are_refused_by_name(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config of Llama beside one matrix for queries, keys and values, as Megatron and GPT-NeoX write them."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    tiny().save_pretrained(source)
    state = load_file(source / "model.safetensors")
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.self_attn."
        parts = [state.pop(f"{where}{part}_proj.weight") for part in "qkv"]
        state[f"{where}query_key_value.weight"] = torch.cat(parts)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert run(str(source), "--kv-heads", "2", *more, "--out", str(tmp_path / "out")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "self_attn.k_proj.weight" in told or "query_key_value" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["deepseek_v3", "youtu", "manyheads"])
def test_tied_embeddings_are_not_lost_in_a_latent(form: str, tmp_path: Path) -> None:
    """Ours ties them too; stock classes get them as two matrices of the same numbers."""
    import manyheads.models  # noqa: F401
    from manyheads.convert import latent

    model = tiny(tie_word_embeddings=True, sliding_window=None).float()
    made = latent(model, 20, format=form, calibration=[list(range(1, 40))] * 4)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(again(ids).logits, made(ids).logits)
    embedded, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    torch.testing.assert_close(embedded, head, rtol=0, atol=0)
    assert (embedded.data_ptr() == head.data_ptr()) == (form == "manyheads")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stream"], "--stream takes --to gqa with --kv-heads"),
        (["--stream", "--kv-heads", "2", "--heal", "1k"], "--heal takes the whole model"),
        (["--stream", "--kv-heads", "2", "--dry-run"], "--dry-run takes the whole model"),
        (["--stream", "--kv-heads", "2", "--align", "procrustes"], "takes the whole model; one file after the other"),
        (["--stream", "--kv-heads", "3"], "can be pooled into 1, 2, 4"),
        (["--stream", "--to", "prune", "--heads", "24"], "cuts by scores that are given"),
        (["--stream", "--to", "mla", "--rank", "8"], "--stream takes --to gqa with --kv-heads"),
        (["--kv-heads", "2", "--scores", "x.json"], "--scores belongs to --stream"),
    ],
)
def test_what_does_not_go_file_by_file(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([[1, 2]], "want 4 lists of 8 numbers"),
        ([["a"] * 8] * 4, "want a JSON list of layers"),
        ({"0": 1}, "want a JSON list of layers"),
        ([[float("nan")] * 8] * 4, "finite"),
    ],
)
def test_scores_that_are_none(scores: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores))
    arguments = ["--stream", "--to", "prune", "--heads", "24", "--scores", str(path)]
    assert run(*arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err


def test_layouts_that_cannot_be_pooled_or_cut_are_refused_by_name() -> None:
    for convert in (lambda m: grouped(m, 2, align="mean"), lambda m: pruned(m, 12, by="random")):
        with pytest.raises(ValueError, match="Olmo2ForCausalLM norms queries and keys over all heads at once"):
            convert(tiny("olmo2"))
        with pytest.raises(ValueError, match=r"GPTNeoXForCausalLM .* has no converter for its layout"):
            convert(tiny("gpt_neox", pad_token_id=None))


def test_calibration_text_shorter_than_asked_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def attend(query, key, value): return softmax(query @ key.T) @ value\n" * 60)
    arguments = ["--kv-heads", "2", "--text", str(text), *SMALL[:-1], "100000", "--out", str(tmp_path / "out")]
    assert run(*arguments) == 2
    assert "give a longer text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_half_written_folder_is_told_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    stream(BUNDLED, out, Pooling(2))
    weights, config = (out / "model.safetensors"), (out / "config.json")
    whole, settings = weights.read_bytes(), config.read_text()
    made = tmp_path / "made"

    def told(*arguments: str) -> str:
        assert run(*arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    weights.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in told(str(out), "--to", "prune", *SMALL, "--out", str(made))
    weights.unlink()
    assert "write or fetch it again" in told(str(out), "--to", "prune", *SMALL, "--out", str(made))
    weights.write_bytes(whole)
    config.write_text(settings[:40])
    assert "config.json is not JSON" in told(str(out), "--to", "prune", *SMALL, "--out", str(made))
    assert not made.exists()
