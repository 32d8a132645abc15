"""Grad-CAM on any stage of image classifiers, against the gradient of the maps that the model itself gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from manyheads.cli import main
from manyheads.explain.explanation import explain_image
from manyheads.explain.pictures import cam, stages_of
from manyheads.hosts.loading import load_any
from manyheads.models import ManyheadsConfig, ManyheadsForImageClassification

SIZES = {"num_labels": 3, "image_size": 24, "patch_size": 4}
STEM = [{"features": 16, "kernel": 4, "stride": 4, "after": "batch", "act": "relu"}]
STAGES = {
    "stem": STEM,
    "stages": [
        {"dim": 16, "depth": 1, "heads": 2, "mixers": [{"name": "twins-local", "window": 3}]},
        {"dim": 32, "depth": 1, "mixers": ["focal-modulation"], "down": {"after": "layer"}},
    ],
}


def _model(**settings: Any) -> Any:
    torch.manual_seed(0)
    return ManyheadsForImageClassification(ManyheadsConfig(**SIZES, **settings)).eval()


def _patches(mechanism: str) -> Any:
    return _model(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, layers=[mechanism])


def _said(*arguments: str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == code, said.err
    return said.err if code else said.out


@pytest.mark.parametrize("kind", ["stages", "softmax", "mambaout", "twins-local"])
def test_every_stage_against_its_gradient(kind: str) -> None:
    model = _model(stages=STAGES) if kind == "stages" else _patches(kind)
    pixels = torch.randn(2, 3, 24, 24)
    parts = model.hierarchy.stages if kind == "stages" else model.stack.layers
    maps: list[Any] = []
    hooks = [part.register_forward_hook(lambda part, given, found: maps.append(found[0])) for part in parts]
    slopes = torch.autograd.grad(model(pixels).logits[:, 1].sum(), maps)
    for hook in hooks:
        hook.remove()
    for stage, (own, slope) in enumerate(zip(maps, slopes, strict=True)):
        alpha = slope.flatten(1, -2).mean(1)
        wanted = torch.einsum("bnk,bk->bn", own.flatten(1, -2), alpha).clamp_min(0).detach()
        found = cam(model, pixels, 1, stage=stage)
        rows = 6 if kind != "stages" or stage == 0 else 3
        assert found.shape == (2, rows, rows)
        torch.testing.assert_close(found.flatten(1), wanted)
        assert bool((found > 0).any())
    torch.testing.assert_close(cam(model, pixels, 1), cam(model, pixels, 1, stage=1))


def test_stages_of_convolutional_models() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
    for model in (
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, embedding_size=8)),
        transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes, num_stages=2, patch_size=2)),
    ):
        assert len(stages_of(model)) == 2
        first, last = (cam(model.eval(), torch.randn(1, 3, 24, 24), 2, stage=stage) for stage in (0, 1))
        assert first.shape[1] == 2 * last.shape[1]


def test_the_command_takes_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    model, picture = tmp_path / "model", ("--image", str(tmp_path / "red.png"), "--out", str(tmp_path / "out"))
    _model(stages=STAGES).save_pretrained(model)
    told = json.loads(_said(str(model), *picture, "--stage", "0", "--target", "2", "--json", code=0, capsys=capsys))
    assert told["stage"] == 0
    assert {name: len(rows) for name, rows in told["maps"].items()} == {"grad-cam": 6, "guided-grad-cam": 24}
    found = explain_image(load_any(model), tmp_path / "red.png", target="2")
    assert len(found.report["maps"]["grad-cam"]) == 3
    for more, words in (
        (("--stage", "2"), "has stages 0 to 1"),
        (("--stage", "-1"), "has stages 0 to 1"),
        (("--stage", "0", "--layers", "0"), "no --layers"),
        (("--stage", "0", "--method", "rollout"), "'rollout' is none of grad-cam"),
    ):
        assert words in " ".join(_said(str(model), *picture, *more, code=2, capsys=capsys).split())
    assert "--stage goes with --image" in _said("--text", "abc", "--stage", "0", code=2, capsys=capsys)


def test_layers_that_see_one_grid_are_explained_by_maps_alone(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    _patches("mambaout").save_pretrained(tmp_path / "model")
    loaded = load_any(tmp_path / "model")
    assert set(explain_image(loaded, tmp_path / "red.png").report["maps"]) == {"grad-cam"}
    with pytest.raises(ValueError, match="no ReLU"):
        explain_image(loaded, tmp_path / "red.png", methods=["guided-grad-cam"])


@pytest.mark.parametrize("kind", ["DeiT", "Dinov2WithRegisters", "Beit"])
def test_models_of_tokens_have_pages_and_no_stages(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=16, patch_size=4, num_labels=3)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    model.save_pretrained(tmp_path / "model")
    Image.new("LA", (40, 30)).save(tmp_path / "grey.png")
    loaded = load_any(tmp_path / "model")
    maps = explain_image(loaded, tmp_path / "grey.png").report["maps"]
    assert {"rollout", "grad-cam"} <= set(maps)
    assert {(len(rows), len(rows[0])) for rows in maps.values()} == {(4, 4)}
    with pytest.raises(ValueError, match=f"{kind}ForImageClassification has no stages that give maps"):
        explain_image(loaded, tmp_path / "grey.png", stage=0)
