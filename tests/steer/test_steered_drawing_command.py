"""`manyheads steer dit`: every declared intervention, both drawings, and what is refused."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing_models import tiny
from PIL import Image
from torch.testing import assert_close

from manyheads.cli import main
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import record
from manyheads.steer.asked import parse
from manyheads.steer.diffusion import box_mask, isolate
from manyheads.steer.diffusion.drawing import Drawing, Rows, pixels_of, some_steps
from manyheads.steer.drawn import steered_drawing, unknown, watched
from manyheads.steer.drawn_report import picture_html, png, text_of
from manyheads.steer.method import methods

CAPTION = "a 3 and a 7"
# What each needs that has no default: regions of the tiny model's 8 x 8 pixels.
GIVEN = {
    "borrow_maps": "source=a 5 above a 1",
    "colour_propagation": "frames=a 3;a 5",
    "edit_words": "words=3",
    "isolate": "boxes=[[0,0,8,4],[0,4,8,8]]",
    "layout_guidance": "source=a 5 above a 1",
    "merge_concepts": 'concepts={"a 1":[0,0,8,4]}',
    "multi_reference": "source=a 5,box=[0,0,8,4]",
    "multi_view": "views=a 3;a 5",
    "plug_and_play": "source=a 5 above a 1",
    "regional_prompts": 'regions={"a 3":[0,0,8,4],"a 1":[0,4,8,8]}',
    "space_time": 'objects={"a 1":[0.5,0.25]}',
}
DECLARED = [own.name for own in methods("diffusion")]
SMALL = Loaded(tiny(), None, "tiny")


def typed(name: str, **more: Any) -> str:
    parts = [GIVEN[name]] if name in GIVEN else []
    return f"{name}[{','.join([*parts, *(f'{key}={value}' for key, value in more.items())])}]"


def drawn(with_: str, **options: Any) -> dict[str, Any]:
    return steered_drawing(SMALL, *parse(with_), Drawing(CAPTION, steps=3), **options)


@pytest.mark.parametrize("name", DECLARED)
def test_neutral_is_the_model_itself_and_the_default_is_not(name: str) -> None:
    """At the declared neutral setting no pixel and no attention moves; as typed, both do; afterwards nothing stays."""
    chosen, _ = parse(typed(name))
    neutral = drawn(typed(name, **chosen.neutral))
    assert neutral["difference"] == {"rms": 0.0, "pixels": 0.0}
    assert all(share == 0 for layers in neutral["moved"].values() for share in layers)
    report = drawn(typed(name))
    assert report["difference"]["rms"] > 1e-6
    assert report["moved"]["self"][1] > 0
    assert_close(torch.tensor(report["pictures"]["without"]), torch.tensor(neutral["pictures"]["without"]))


def test_a_reference_of_an_isolated_subject_is_drawn_beside_it() -> None:
    """By hand: the reference is the second caption, its box all that its subject sees of it."""
    boxes = "boxes=[[0,0,8,4],[0,4,8,8]]"
    report = drawn(f"isolate[{boxes},source=a 5,subject=1,box=[0,0,8,4]]")
    model = tiny()
    left, right = box_mask(model, (0, 0, 8, 4)), box_mask(model, (0, 4, 8, 8))
    seen = torch.stack([torch.zeros_like(left), left])
    with isolate(model, torch.stack([left, right]), references={1: 1}, reference_masks=seen):
        wanted = model.sample([CAPTION, "a 5"], steps=3)[0]
    assert_close(torch.tensor(report["pictures"]["with"]).flatten()[:64], wanted.flatten().float(), atol=2e-3, rtol=0)
    alone = drawn(f"isolate[{boxes}]")
    assert report["pictures"]["with"] != alone["pictures"]["with"]
    neutral = drawn(f"isolate[{boxes},source=a 5,share=0]")
    assert neutral["difference"] == {"rms": 0.0, "pixels": 0.0}


@pytest.mark.parametrize("name", DECLARED)
def test_strength_lies_within_the_reach_of_its_slider(name: str) -> None:
    chosen, _ = parse(typed(name))
    assert chosen.strength is not None
    assert chosen.reach is not None
    low, high = chosen.reach
    assert low <= float(chosen.neutral[chosen.strength]) <= high
    assert low <= float(chosen.arguments[chosen.strength]) <= high


def test_words_are_the_cross_attention_of_the_captions_own_row() -> None:
    """By hand from the recorded calls; an erased word has no map."""
    model, drawing = tiny(), Drawing(CAPTION, steps=2)
    with record(model, kind="cross") as calls:
        model.sample([CAPTION], steps=2)
    wanted = torch.stack([call.weights()[1].mean(0).T for call in calls]).unflatten(0, (2, 2)).mean(1).float()
    assert_close(watched(model, drawing, None, Rows((CAPTION,))).words, wanted)
    report = drawn("edit_words[words=3]")
    shares = {row["word"]: row["share"]["with"] for row in report["words"]}
    assert shares["3"] == 0
    assert shares["7"] > 0
    assert report["cost"]["step_rows"] == {"without": 2, "with": 2}
    assert drawn("perturbed_guidance")["cost"]["step_rows"] == {"without": 2, "with": 3}


def test_unknown_is_the_models_own_error() -> None:
    model = tiny()
    picture = torch.randn(1, 1, 8, 8, dtype=torch.double)
    ids, mask = model.encode([CAPTION])
    errors = []
    for number in range(8):
        noise = model.noise(8, 1)[number : number + 1]
        for t in (0.2, 0.4, 0.6, 0.8):
            with torch.no_grad():
                said = model.velocities((1 - t) * picture + t * noise, t, ids, mask)
            errors.append(float((said - noise + picture).square().mean()))
    assert unknown(model, picture, CAPTION) == pytest.approx(sum(errors) / len(errors))


def test_sweep_follows_a_wanted_caption() -> None:
    report = drawn(typed("regional_prompts"), wanted="a 3 left of a 1", sweep=("weight", [0.0, 1.0]))
    first, last = report["sweep"]["points"]
    assert first["rms"] == first["lost"] == first["gained"] == 0
    assert last["rms"] == pytest.approx(report["difference"]["rms"])
    known = report["known"]
    before, after = (known[side]["wanted"] - known[side]["caption"] for side in ("without", "with"))
    assert last["gained"] == pytest.approx(before - after)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(["steer", "dit", *arguments, "--json"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return json.loads(said.out)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the packaged model: the page holds the pictures that the record does, and a drawing goes in again as a
    reference."""
    text = ("--text", CAPTION, "--steps", "2", "--seed", "3", "--out", str(tmp_path))
    report = told(capsys, "--with", 'regional_prompts[regions={"a 3":[4,0,12,8],"a 7":[4,8,12,16]}]', *text)
    page = (tmp_path / "steer.html").read_text()
    for side in ("without", "with"):
        own = np.asarray(report["pictures"][side][0])
        data = re.search(rf'base64,([^"]+)" alt="a 3 and a 7, {side}"', page)
        assert data is not None
        shown = np.asarray(Image.open(BytesIO(base64.b64decode(data[1]))))
        assert shown.tolist() == ((own[0].clip(-1, 1) + 1) * 127.5).round().tolist()
        assert (tmp_path / f"{side}.png").read_bytes() == png(own)
    assert page.count("default-src 'none'") == 1
    assert len(text_of(report)) == 17
    again = told(capsys, "--with", "plug_and_play[source=a 3 and a 7]", "--image", str(tmp_path / "with.png"), *text)
    kept = np.asarray(again["pictures"]["with"][1])
    assert np.abs(kept - np.asarray(report["pictures"]["with"][0]).clip(-1, 1)).max() < 0.01


def test_a_picture_is_read_as_the_model_draws(tmp_path: Path) -> None:
    levels = np.linspace(-1, 1, 64).reshape(1, 8, 8)
    read = pixels_of(tiny(), Image.open(BytesIO(png(levels))))
    assert_close(read, torch.from_numpy(levels)[None], atol=1 / 255, rtol=0)
    assert "image-rendering:pixelated" in picture_html(levels, "<x>", 10)
    assert "&lt;x&gt;" in picture_html(levels, "<x>", 10)


def test_steps_are_those_that_are_named() -> None:
    active = some_steps("x", Drawing(CAPTION, steps=6), "0-1,4")
    assert active is not None
    assert [step for step in range(6) if active(step, 0)] == [0, 1, 4]
    assert some_steps("x", Drawing(CAPTION), " ") is None


IMAGE = ("--image", "{image}")


@pytest.mark.parametrize(
    ("with_", "more", "message"),
    [
        ("edit_words[words=3]", ("--text", "a 3 left of a cat"), "does not know 'cat'"),
        ("edit_words[words=9]", (), "the caption has no 9; its words are a, 3, and, 7"),
        ("edit_words[words=3,steps=20]", (), "20 is outside of the schedule, which has steps 0 to 19"),
        ("edit_words[words=3,steps=x]", (), "want such as 0-4"),
        ("edit_words", (), "edit_words needs words"),
        ("regional_prompts[regions={'a':1}]", (), "is no JSON"),
        (
            'regional_prompts[regions={"a 3":[0,0,17,8]}]',
            (),
            "is no region (top, left, bottom, right) of a picture of 16",
        ),
        ('regional_prompts[regions={"a 3":[0,0,8]}]', (), "is no region: want [top, left, bottom, right]"),
        ('regional_prompts[regions={"a cat":[0,0,8,8]}]', (), "does not know 'cat'"),
        ("isolate[boxes=[[0,0,8,8]]]", (), "want 2 to 8 boxes"),
        ("isolate[boxes=[[0,0,8,8],[0,0,4,4]]]", (), "subjects overlap"),
        ("isolate[boxes=[[0,0,8,8],[8,8,16,16]],source=a 3,subject=2]", (), "subject=2 of 2 boxes"),
        ("isolate[boxes=[[0,0,8,8],[8,8,16,16]],subject=1]", (), "give source=CAPTION"),
        ('space_time[objects={"a 3":[2,0]}]', (), "is no place in the picture"),
        ("plug_and_play[source=a cat]", (), "does not know 'cat'"),
        ("plug_and_play[source=a 3,share=2]", (), "until wants a share"),
        ("layout_guidance", (), "layout_guidance needs a layout"),
        ("multi_view[views=;]", (), "0 captions beside the drawing"),
        ("perturbed_guidance[heads=9.0]", (), "no such layers"),
        ("perturbed_guidance", IMAGE, "takes no reference picture"),
        ("plug_and_play[source=a 3]", IMAGE, "--image is 5 x 4 pixels; the model draws 16 x 16"),
        ("perturbed_guidance", ("--span", "3"), "leave --span out"),
        ("perturbed_guidance", ("--chat",), "leave --chat out"),
        ("perturbed_guidance", ("--new", "3"), "leave --new out"),
        ("perturbed_guidance", ("--wanted", "a cat"), "does not know 'cat'"),
        ("perturbed_guidance", ("--text", " "), "the text is empty"),
        ("boost", (), "boost takes language, vision-language models; dit is a diffusion model"),
    ],
)
def test_what_is_refused(
    with_: str, more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "small.png")
    options = [part.format(image=tmp_path / "small.png") for part in more]
    text = [] if "--text" in more else ["--text", CAPTION]
    with pytest.raises(SystemExit) as stopped:
        main(["steer", "dit", "--with", with_, *text, *options, "--out", str(tmp_path / "made")])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "made").exists()


def test_drawing_is_not_for_models_that_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--with", "perturbed_guidance"], "perturbed_guidance takes diffusion models; byte_llama is a language model"),
        (["--with", "buckets", "--seed", "3"], "byte_llama draws nothing: leave --seed out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["steer", *arguments, "--text", "x", "--out", str(tmp_path / "made")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
