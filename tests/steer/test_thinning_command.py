"""Thinning as users type it: what was attended to lies at the prompt's own places, and time and bytes are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, llava

from manyheads.cli import main
from manyheads.hosts.taps import record
from manyheads.steer.measuring import look
from manyheads.steer.method import Prompt, methods
from manyheads.steer.thinning.exit import visual_exit


def test_the_command_tells_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (40, 40), 120).save(tmp_path / "scene.png")
    with pytest.raises(SystemExit) as stopped:
        main(
            ["steer", "vlm", "--with", "visual_exit[layer=2]", "--image", str(tmp_path / "scene.png"), "--json",
             "--text", "Is there a 3?", "--new", "3", "--out", str(tmp_path / "out")]
        )  # fmt: skip
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    report = json.loads(said.out)
    places = report["prompt"]["spans"]["image"]
    length, held = len(report["prompt"]["tokens"]), report["cost"]["cache_bytes"]
    fed = length + report["cost"]["tokens"]
    assert len(places) == 64
    assert held["with"] / held["without"] == pytest.approx((4 * fed - 2 * 64) / (4 * fed))
    assert report["attention"]["image"]["with"][2:] == [0.0, 0.0]
    assert min(report["attention"]["image"]["with"][:2]) > 0


def test_what_is_looked_at_lies_at_the_places_of_the_prompt() -> None:
    model = llava()
    row = {name: own[:1] for name, own in batch("right").items()}
    image = row["input_ids"][0].eq(IMAGE).nonzero()[:, 0].tolist()
    text = [12, 13]
    prompt = Prompt(row, {"image": image, "text": text, "text1": text})
    seen = look(model, prompt, lambda: visual_exit(model, layer=2))
    with torch.no_grad(), visual_exit(model, layer=2), record(model, stack="language") as calls:
        model(**row)
    # Three words stand before the image, three behind it.
    short = calls[3].weights()[0, :, -1].mean(0)
    assert short.shape == (6,)
    assert_close(seen.shares["text"][3], float(short[3:5].sum()))
    assert seen.shares["image"][2:] == [0.0, 0.0]


def test_all_of_them_are_declared() -> None:
    names = {own.name for own in methods("vision-language")}
    assert {"visual_exit", "merge_and_prune", "must_drop", "clustered"} <= names
