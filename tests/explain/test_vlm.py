"""`manyheads explain vlm`: the packaged model that reads pictures, and what is said of its answers."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoProcessor

from manyheads.cli import main
from manyheads.explain.seen import explain_sight
from manyheads.explain.sight import Sight, continued, see, token_divergence
from manyheads.hosts.loading import find_model
from manyheads.hosts.seeing import Seeing, load_seeing
from manyheads.tasks.scenes import Asked, held_out, pictures


@cache
def vlm() -> Seeing:
    return load_seeing()


@cache
def asked() -> Asked:
    return held_out(60, seed=3)


def one() -> tuple[Any, str]:
    """A picture and a question about it."""
    scene = held_out(1, kind="count-digit", seed=5)
    return pictures(scene.pixels)[0], scene.questions[0][0].text


@cache
def sight() -> Sight:
    return see(vlm(), *one())


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    picture, _ = one()
    picture.resize((160, 160), Image.Resampling.NEAREST).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged folder, to be spoilt."""
    return Path(shutil.copytree(find_model("vlm"), tmp_path / "copy"))


def said(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *given])
    found = capsys.readouterr()
    assert stopped.value.code == 0, found.err
    return found.out


def refused(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *given])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_answers_about_glyphs_that_it_has_not_seen() -> None:
    texts = [own.text for (own,) in asked().questions]
    answers = vlm().answers(pictures(asked().pixels), texts, most=14)
    right = sum(answer == own.answer for answer, (own,) in zip(answers, asked().questions, strict=True))
    assert right >= FLOOR * len(answers)


FLOOR = 0.85


def test_its_folder_opens_with_transformers_alone() -> None:
    """The same ids and pixels as AutoProcessor, which knows nothing of manyheads."""
    picture, text = one()
    theirs = AutoProcessor.from_pretrained(find_model("vlm"), backend="pil")
    wanted = theirs(images=picture.convert("RGB"), text=vlm().prompt(text), return_tensors="pt")
    found = vlm().inputs([picture], [text])
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    assert_close(found["pixel_values"], wanted["pixel_values"])


def test_rows_of_a_batch_are_padded_on_the_left_and_answer_as_alone() -> None:
    rows = slice(0, 4)
    shown, texts = pictures(asked().pixels[rows]), [own.text for (own,) in asked().questions[rows]]
    together = vlm().answers(shown, texts, most=6)
    assert together == [vlm().answers([own], [text], most=6)[0] for own, text in zip(shown, texts, strict=True)]
    inputs = vlm().inputs(shown, texts)
    assert inputs["attention_mask"][:, -1].all()
    assert vlm().is_image(inputs["input_ids"]).sum(1).tolist() == [64] * 4


def test_without_a_picture_the_row_holds_the_text_alone() -> None:
    picture, text = one()
    alone = vlm().without(vlm().inputs([picture, picture], [text, "Which digits?"]))
    assert "pixel_values" not in alone
    rows = [row[own.bool()] for row, own in zip(alone["input_ids"], alone["attention_mask"], strict=True)]
    assert [vlm().tokenizer.decode(row) for row in rows] == [f"{text}\n", "Which digits?\n"]
    assert alone["attention_mask"][:, -1].all()
    assert alone["input_ids"].shape == alone["attention_mask"].shape


def test_probabilities_and_weights_against_the_models_own() -> None:
    """One eager pass gives the attention; teacher forcing gives the probabilities."""
    found, seeing = sight(), vlm()
    again = load_seeing(attn_implementation="eager").model(**found.inputs, output_attentions=True)
    k = len(found.answer)
    eager = torch.stack([own[0, :, -k - 1 : -1] for own in again.attentions]).permute(2, 0, 1, 3)
    assert_close(found.attention.float(), eager, atol=1e-5, rtol=1e-4)
    shares = again.logits[0, -k - 1 : -1].softmax(-1).gather(1, torch.tensor(found.answer)[:, None])[:, 0]
    assert_close(found.with_image.float(), shares, atol=1e-5, rtol=1e-4)
    bare = seeing.model(**continued(seeing.without(seeing.inputs([one()[0]], [one()[1]])), found.answer)).logits
    shares = bare[0, -k - 1 : -1].softmax(-1).gather(1, torch.tensor(found.answer)[:, None])[:, 0]
    assert_close(found.without_image.float(), shares, atol=1e-5, rtol=1e-4)


def test_sources_are_the_slope_of_the_answer() -> None:
    """Patches scaled by 1 + e move log p by e times their sources, to first order."""
    found, model = sight(), vlm().model

    def told(scale: float) -> Tensor:
        def scaled(module: Any, args: Any, output: Any) -> Any:
            output.pooler_output = [own * scale for own in output.pooler_output]
            return output

        own = model.model.get_image_features
        try:
            model.model.get_image_features = lambda *args, **kwargs: scaled(None, args, own(*args, **kwargs))
            with torch.no_grad():
                logits = model(**found.inputs).logits[0, -len(found.answer) - 1 : -1].double().log_softmax(-1)
        finally:
            del model.model.get_image_features
        return logits.gather(1, torch.tensor(found.answer)[:, None])[:, 0]

    step = 2e-3
    slope = (told(1 + step) - told(1 - step)) / (2 * step)
    assert_close(found.layout.grid(found.sources).sum((-1, -2)), slope, atol=5e-3, rtol=5e-2)


def test_edges_are_the_slope_of_one_heads_looks() -> None:
    """A head's output moved along what it took from the patches moves log p by its edges, to first order."""
    from manyheads.hosts.taps import tap

    found, layer, head, step = sight(), 1, 0, 1e-2
    n, k = found.inputs["input_ids"].shape[1], len(found.answer)
    at = n - k - 1

    def told(scale: float) -> float:
        def scaled(call: Any) -> Tensor:
            def edit(weights: Tensor, rows: slice) -> Tensor:
                weights = weights.clone()
                chosen = [i for i in range(rows.start, rows.stop) if i == at]
                for own in chosen:
                    weights[:, :, own - rows.start, found.layout.first : found.layout.stop] *= scale
                return weights

            return call.mix(edit, [head])

        with torch.no_grad(), tap(vlm().model, scaled, layers=[layer], stack="language"):
            logits = vlm().model(**found.inputs).logits[0, at].double().log_softmax(-1)
        return float(logits[found.answer[0]])

    slope = (told(1 + step) - told(1 - step)) / (2 * step)
    edge = float(found.layout.grid(found.edges[0, layer, head]).sum())
    assert edge == pytest.approx(slope, abs=2e-3, rel=5e-2)


def test_divergence_of_a_planted_head_that_reads_patches_alone() -> None:
    """A head whose values are of patches alone moves; one whose values are zero does not."""
    seeing = load_seeing()
    attention = seeing.model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[:16] = 0  # heads 0 and 1
    found = see(seeing, *one())
    assert_close(found.divergence[:, 0, :2], torch.zeros(len(found.answer), 2).double())
    assert (found.divergence[:, 0, 2:] > 0).all()
    assert (token_divergence(found.divergence) > 0).all()


def test_token_divergence_sums_the_greatest_of_each_layer() -> None:
    own = torch.tensor([[[1.0, 5.0, 2.0, 0.5], [3.0, 0.0, 1.0, 4.0]]])
    assert_close(token_divergence(own), torch.tensor([5.0 + 2 + 4 + 3]))
    assert_close(token_divergence(own, share=0.25), torch.tensor([5.0 + 4]))
    with pytest.raises(ValueError, match="share=0; want a share"):
        token_divergence(own, share=0)


def test_the_command(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = one()[1]
    given = ("vlm", "--image", str(scene), "--text", text, "--out", str(tmp_path / "out"), "--json")
    report = json.loads(said(capsys, *given))
    assert report == json.loads((tmp_path / "out" / "explain.json").read_text()) | {"files": report["files"]}
    assert report["answer"]["leans"] in ("image", "prior")
    assert report["patches"] == {"rows": 8, "columns": 8}
    for token in report["tokens"]:
        assert len(token["heads"]) == 4 * 8
        assert all(0 <= own["on_picture"] <= 1 + 1e-6 for own in token["heads"])
        assert len(token["patch_map"]) == 8
    assert set(report["heads"]) == {"VHD", "on the picture", "edge on the picture", "visual", "visual-concentration"}
    page = (tmp_path / "out" / "explain.html").read_text()
    assert "Which patches" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_table(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("vlm", "--image", str(scene), "--text", one()[1], "--layers", "1", "--out", str(tmp_path / "out"))
    shown = said(capsys, *given)
    assert "leans on the" in shown
    assert "most visual heads" in shown


def test_what_the_command_refuses(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ("--image", str(scene))
    assert "has no vision tower" in refused(capsys, *image, "--text", "How many 7s?")
    assert "give --image and --text" in refused(capsys, "vlm", "--text", "How many 7s?")
    assert "do not go with a picture and a text" in refused(capsys, "vlm", *image, "--text", "a", "--target", "3")


def test_what_is_refused(scene: Path) -> None:
    for text, problem in (
        (" ", "the text is empty"),
        ("<image><image>Who?", "2 image tokens, where one is meant"),
        ("x" * 1000, "has positions for 1,024"),
    ):
        with pytest.raises(ValueError, match=problem):
            explain_sight(vlm(), scene, text)
    with pytest.raises(ValueError, match="no such layers"):
        explain_sight(vlm(), scene, "How many 7s?", layers=[4])
    with pytest.raises(ValueError, match="no image that can be read"):
        explain_sight(vlm(), __file__, "How many 7s?")


def test_pictures_and_texts_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="1 pictures for 2 texts"):
        vlm().inputs([one()[0]], ["a", "b"])
    with pytest.raises(ValueError, match="no picture was given"):
        vlm().inputs([], [])


def test_folders_that_lack_something(folder: Path, scene: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="no image processor that can be read"):
        load_seeing(folder)
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 5000}))
    shutil.copy(Path(find_model("vlm")) / "processor_config.json", folder)
    with pytest.raises(ValueError, match="has no image token"):
        load_seeing(folder).inputs([one()[0]], ["How many 7s?"])
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_next"}))
    with pytest.raises(ValueError, match="is a llava_next; pictures with text are read by a Llava"):
        load_seeing(folder)


def test_a_prompt_of_ones_own_and_a_template_without_a_picture(folder: Path) -> None:
    whole = "<image>How many 7s?\n"
    assert vlm().prompt(whole) == whole == vlm().prompt("How many 7s?")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}: hello")
    with pytest.raises(ValueError, match="no image token in the prompt"):
        load_seeing(folder).prompt("How many 7s?")
