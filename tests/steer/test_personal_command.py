"""`manyheads steer personalise`: end to end on tiny models, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing_models import tiny, tiny_unet
from PIL import Image
from torch.testing import assert_close

from manyheads.cli import main
from manyheads.hosts.loading import load_any

WORDS = {"disendiff": "mine 3 and yours 7"}
FORMS = ("attencraft[threshold=-1]", "disendiff[weight=0.1]", "dreamtext", "mcpl[scale=0.1]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().float().save_pretrained(folder)
    return folder


def typed(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def picture(path: Path, size: int = 8, levels: Any = None) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (size, size)) if levels is None else levels
    Image.fromarray(np.asarray(drawn, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one with a caption of its own and a mask."""
    own = tmp_path / "pictures"
    own.mkdir()
    picture(own / "a.png")
    picture(own / "b.png")
    (own / "a.txt").write_text("a mine and a yours\n")
    mask = np.zeros((8, 8))
    mask[:, :4] = 255
    picture(own / "a.mine.png", levels=mask)
    return own


def asked(model: Path, out: Path, *more: str, form: str = "mcpl", subjects: Any = ("mine=3", "yours=7")) -> list[str]:
    told = [part for own in subjects for part in ("--subject", own)]
    return ["steer", "personalise", str(model), "--with", form, *told, "--steps", "1", "--out", str(out), *more]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_made_opens_again_and_draws_the_same(
    form: str, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = form.partition("[")[0], tmp_path / "out" / "made"
    caption = WORDS.get(name, "a mine and a yours")
    (folder / "a.txt").write_text(caption)
    given = ["--images", str(folder), "--text", caption, "--draw", caption, "--rate", "0.1", "--json"]
    assert typed(asked(model, out, *given, form=form)) == 0
    told, stored = json.loads(capsys.readouterr().out), json.loads((out / "personalised.json").read_text())
    assert told == stored
    assert [own["name"] for own in told["pictures"]] == ["a.png", "b.png"]
    assert list(told["measures"]) == ["without", "plain", name]
    assert all(0 < own["leak"] < 1 for own in told["measures"].values())
    assert told["measures"]["without"]["changed"] == 0
    assert told["measures"][name]["changed"] >= 0
    made = load_any(out)
    again = made.model.sample([caption], steps=told["drawn"]["steps"], seed=told["drawn"]["seed"])
    assert_close(again, torch.tensor(told["drawn"][name]), atol=1e-4, rtol=0)
    assert float((again - torch.tensor(told["drawn"]["without"])).abs().max()) > 1e-3
    assert sorted(own.name for own in out.iterdir()) == [
        "config.json", "drawn-0.png", "model.safetensors", "personalised.html", "personalised.json",
    ]  # fmt: skip
    assert not list(out.parent.glob(".*"))


def test_another_command_draws_by_the_new_words_and_a_second_run_takes_the_first_ones_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "unet", tmp_path / "made"
    tiny_unet().float().save_pretrained(model)
    given = ["--image", str(folder / "a.png"), "--seed", "1"]
    assert typed(asked(model, out, *given)) == 0
    assert "knows the pictures" in capsys.readouterr().out
    first = (out / "model.safetensors").read_bytes()
    assert typed(asked(model, out, *given[:2], "--seed", "2")) == 0
    assert (out / "model.safetensors").read_bytes() != first
    steered = ["steer", str(out), "--with", "edit_words[words=mine]", "--text", "a mine and a yours", "--steps", "2"]
    assert typed([*steered, "--out", str(tmp_path / "steered")]) == 0
    assert not (tmp_path / "made" / "steer.json").exists()
    capsys.readouterr()
    assert typed(asked(model, tmp_path / "steered", *given)) == 2
    assert "holds other things" in capsys.readouterr().err


def test_the_list_names_the_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(["steer", "list", "--kind", "diffusion"]) == 0
    told = capsys.readouterr().out
    assert all(name.partition("[")[0] in told for name in FORMS)


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no picture": ([], {}, "0 pictures"),
    "an empty folder": (["--images", "EMPTY"], {}, "holds no picture"),
    "no such folder": (["--images", "NOWHERE"], {}, "is no folder"),
    "no caption": (["--images", "FOLDER"], {}, "b.png has no caption"),
    "a caption without the subject": (["--images", "FOLDER", "--text", "a 3"], {}, "b.png: the caption a 3 has no"),
    "an unknown word in a caption": (["--images", "FOLDER", "--text", "a mine on a 3"], {}, "does not know 'on'"),
    "a subject twice in a caption": (["--images", "FOLDER", "--text", "mine mine"], {}, "has 'mine' twice"),
    "a caption that is too long": (["--images", "FOLDER", "--text", "mine " + "a " * 8], {}, "want 7 at most"),
    "a picture of another size": (["--image", "LARGE", "--text", "mine yours"], {}, "is 9 x 9 pixels"),
    "no image": (["--image", "TEXT", "--text", "mine yours"], {}, "no image that can be read"),
    "a mask of another size": (["--image", "MASKED", "--text", "mine yours"], {}, "a mask has the picture's 8 x 8"),
    "a mask that is black": (["--image", "BLACK", "--text", "mine yours"], {}, "black all over"),
    "a mask of a word that is not there": (["--image", "OTHER", "--text", "mine 3"], {}, "does not have"),
    "a subject that no caption has": (
        ["--image", "PLAIN", "--text", "a mine"], {}, "no caption has the subject 'yours'",
    ),
    "a subject of several words": (["--images", "FOLDER"], {"subjects": ("my three=3",)}, "is 2 words"),
    "a new word without one to begin as": (["--images", "FOLDER"], {"subjects": ("mine",)}, "mine=WORD"),
    "a word to begin as that is unknown": (["--images", "FOLDER"], {"subjects": ("mine=three",)}, "know three"),
    "a known word with another": (["--images", "FOLDER"], {"subjects": ("3=4",)}, "knows '3' already"),
    "a subject twice": (["--images", "FOLDER"], {"subjects": ("mine=3", "mine=4")}, "want different words"),
    "no subject": (["--images", "FOLDER"], {"subjects": ()}, "given 0 times"),
    "one subject to set apart": (["--image", "PLAIN", "--text", "a mine"], {"subjects": ("mine=3",)}, "is one subject"),
    "no class behind a subject": (
        ["--image", "PLAIN", "--text", "a mine and a yours"], {"form": "disendiff"}, "no class follows the subject",
    ),
    "adjectives that do not fit": (
        ["--image", "PLAIN", "--text", "a mine and a yours"], {"form": "mcpl[adjectives=left]"}, "1 adjectives of 2",
    ),
    "an adjective that is not there": (
        ["--image", "PLAIN", "--text", "left mine and a yours"], {"form": "mcpl[adjectives=left,right]"}, "no 'right'",
    ),
    "masks that hold nothing": (
        ["--image", "PLAIN", "--text", "a mine and a yours"], {"form": "attencraft[threshold=2]"}, "claimed by 'mine'",
    ),
    "an unknown form": (["--images", "FOLDER"], {"form": "mcpll"}, "did you mean 'mcpl'"),
    "an unknown argument": (["--images", "FOLDER"], {"form": "mcpl[weight=1]"}, "has no argument 'weight'"),
    "a rate that cannot be": (["--image", "PLAIN", "--text", "a mine and a yours", "--rate", "-1"], {}, "rate=-1"),
    "an unknown word to draw": (
        ["--image", "PLAIN", "--text", "a mine and a yours", "--draw", "a cat"], {}, "does not know 'cat'",
    ),
    "a model that draws nothing": (["--images", "FOLDER"], {"model": "vlm"}, "cannot be personalised"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_written(
    case: str, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"FOLDER": folder, "EMPTY": tmp_path / "empty", "NOWHERE": tmp_path / "nowhere", "MODEL": model}
    for name, size in (("LARGE", 9), ("MASKED", 8), ("BLACK", 8), ("OTHER", 8), ("PLAIN", 8)):
        places[name] = tmp_path / f"{name.lower()}.png"
        picture(places[name], size)
    picture(tmp_path / "masked.mine.png", 9)
    picture(tmp_path / "black.mine.png", levels=np.zeros((8, 8)))
    picture(tmp_path / "other.yours.png")
    places["TEXT"] = tmp_path / "text.png"
    places["TEXT"].write_text("no picture")
    given, how, words = REFUSED[case]
    more = [str(places.get(part, part)) for part in given]
    assert (
        typed(
            asked(
                how.get("model", model),
                tmp_path / "out",
                *more,
                **{key: own for key, own in how.items() if key != "model"},
            )
        )
        == 2
    )
    err = capsys.readouterr().err
    assert words in err, err
    assert not (tmp_path / "out").exists()


def test_training_that_diverges_is_stopped(model: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--images", str(folder), "--text", "a mine and a yours", "--steps", "40", "--rate", "9"]
    base = load_any(model).model
    with torch.no_grad():
        base.velocity.weight.fill_(float("nan"))
    base.save_pretrained(tmp_path / "broken")
    assert typed(asked(tmp_path / "broken", tmp_path / "out", *given)) == 2
    assert "the loss is nan at step 0" in capsys.readouterr().err
