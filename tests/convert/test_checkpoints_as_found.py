"""Checkpoints as they are found: with code of their own, adapters, quantised, in float16, in files of another time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert import grouped, hosted, latent, pruned, settled, shifted, student
from manyheads.convert.saving import save_conversion, stored_dtype
from manyheads.convert.streamed import Change, Cutting, Pooling, stream
from manyheads.hosts.loading import Loaded, load_model

SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2,
    "intermediate_size": 24, "vocab_size": 256, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ROWS = [list(range(1, 30)), list(range(60, 90))]
RECORD = {"source": {"name": "it"}, "title": "made", "rows": []}


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()


def saved(model: Any, folder: Path, **settings: Any) -> Path:
    """settings: of its config.json, None for what is not there."""
    model.save_pretrained(folder)
    held = {**read(folder / "config.json"), **settings}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in held.items() if v is not None}))
    return folder


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# -- code of their own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repository", ["", "somebody/model--"])
@pytest.mark.parametrize("streamed", [True, False])
def test_code_that_does_not_come_along_is_not_named(repository: str, streamed: bool, tmp_path: Path) -> None:
    code = {"AutoConfig": f"{repository}own.OwnConfig", "AutoModelForCausalLM": f"{repository}own.OwnForCausalLM"}
    source, out = saved(tiny(), tmp_path / "source", auto_map=code), tmp_path / "out"
    (source / "own.py").write_text("raise SystemExit('code of a checkpoint was run')")
    if streamed:
        stream(source, out, Pooling(2))
    else:
        loaded = load_model(source)
        save_conversion(grouped(loaded.model, 2, align="mean"), loaded, out, RECORD)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.config.num_key_value_heads == 2
    assert type(model).__module__.startswith("transformers.")


def test_our_own_opener_comes_along_and_is_named(tmp_path: Path) -> None:
    model = tiny()
    save_conversion(hosted(model), Loaded(model, None, "it"), tmp_path / "out", RECORD)
    assert read(tmp_path / "out" / "config.json")["auto_map"]["AutoModelForCausalLM"].startswith("open_manyheads.")


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_the_files_where_the_settings_do_not_say(dtype: str, tmp_path: Path) -> None:
    source = saved(tiny().to(getattr(torch, dtype)), tmp_path / "source", dtype=None)
    assert "dtype" not in read(source / "config.json")
    assert stored_dtype(load_model(source)) == dtype


def test_an_exact_norm_has_no_room_in_float16(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--norm exact holds a channel beyond what float16 counts to"):
        latent(tiny().half(), 8, calibration=ROWS)
    source = saved(tiny().half(), tmp_path / "source")
    small = ["--windows", "1", "--keys", "1", "--length", "160", "--calibrate", "160"]
    with pytest.raises(SystemExit) as end:
        main(["convert", str(source), "--to", "mla", *small, "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "--norm fitted" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_gives_no_numbers_is_not_written(tmp_path: Path) -> None:
    model = tiny().half()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[0].mlp.gate_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"logits that are no finite numbers.*give --dtype bfloat16 or float32"):
        save_conversion(model, Loaded(model, None, "it"), tmp_path / "out", RECORD)
    assert not list(tmp_path.iterdir())


# -- adapters, and what stands around a model --------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any], Any]] = {
    "grouped": lambda model: grouped(model, 2, align="mean"),
    "pruned": lambda model: pruned(model, 8, by="random"),
    "hosted": hosted,
    "latent": lambda model: latent(model, 8, calibration=ROWS),
    "shifted": lambda model: settled(shifted(model)),
    "student": lambda model: student(model, 1),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("places", [["up_proj"], ["q_proj"]], ids=str)
def test_adapters_are_not_left_out(places: list[str], way: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=places, r=2, init_lora_weights=False)
    around = peft.get_peft_model(tiny(), config)
    for given in (around, around.get_base_model()):
        with pytest.raises(ValueError, match="merge_and_unload"):
            WAYS[way](given)
    WAYS[way](around.merge_and_unload())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_told_to_be_given_without(way: str) -> None:
    with pytest.raises(ValueError, match="`_orig_mod`"):
        WAYS[way](torch.compile(tiny()))


# -- files -------------------------------------------------------------------------------------------------------------


def test_scales_of_quantised_weights_are_not_pooled(tmp_path: Path) -> None:
    source = saved(tiny(), tmp_path / "source", quantization_config={"quant_method": "compressed-tensors"})
    held = load_file(source / "model.safetensors")
    for name in [name for name in held if "k_proj" in name or "v_proj" in name]:
        scale = held[name].abs().amax(1, keepdim=True) / 448
        held[name] = (held[name] / scale).to(torch.float8_e4m3fn)
        held[f"{name}_scale"] = scale
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is quantised"):
        stream(source, tmp_path / "out", Pooling(2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [Pooling(2), Cutting(8, [[float(i) for i in range(8)]] * 2)], ids=["pool", "cut"])
def test_tensors_that_the_class_does_not_read_stay_behind(change: Change, tmp_path: Path) -> None:
    source = saved(tiny(), tmp_path / "source")
    held = load_file(source / "model.safetensors")
    older = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    save_file({**held, **older}, source / "model.safetensors", metadata={"format": "pt"})
    stream(source, tmp_path / "out", change)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == held.keys()
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())


def test_all_chat_templates_come_along_and_folders_are_no_files(tmp_path: Path) -> None:
    source, out = saved(tiny(), tmp_path / "source"), tmp_path / "out"
    names = ("tokenizer/tokenizer.json", "additional_chat_templates/tool_use.jinja", "chat_template.jinja")
    for name in names:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    stream(source, out, Pooling(2))
    assert not (out / "tokenizer").exists()
    assert all((out / name).read_text() == name for name in names[1:])
    shutil.rmtree(out)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_number_of_heads_that_the_class_would_not_open_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="takes only numbers of heads that divide its hidden size 32"):
        pruned(tiny(kind), 12, by="random")
