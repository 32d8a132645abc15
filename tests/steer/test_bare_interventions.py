"""`--with NAME` with nothing said: on the packaged models it does something, or is refused by name; never nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from manyheads.hosts.loading import load_model
from manyheads.hosts.seeing import load_seeing
from manyheads.steer.asked import parse
from manyheads.steer.diffusion.drawing import Drawing
from manyheads.steer.drawn import sampled, watched
from manyheads.steer.method import Prompt, method, methods
from manyheads.steer.prompting import picture_prompt, text_prompt
from manyheads.tasks.scenes import held_out, pictures

TEXT = (
    "\nThe pass key is 11111. Remember it.\nThe pass key is 77777. Remember it.\nWhat is the pass key? The pass key is "
)


@cache
def asked(kind: str, marked: bool) -> tuple[Any, Any]:
    """A packaged model of the kind, and a prompt."""
    if kind == "diffusion":
        return load_model("dit").model, Drawing("a 3 and a 7", steps=2)
    marks = ["11111", "77777"] if kind == "language" else ["Is there", "a 3"]
    if kind == "language":
        loaded = load_model()
        return loaded.model, text_prompt(loaded, TEXT, marks if marked else ())
    seeing = load_seeing("vlm")
    picture = pictures(held_out(1, kind="exists", seed=3).pixels)[0]
    return seeing.model, picture_prompt(seeing, picture, "Is there a 3?", marks if marked else ())


@torch.no_grad()
def moved(kind: str, marked: bool, with_: str) -> float:
    model, prompt = asked(kind, marked)
    chosen, arguments = parse(with_)
    if kind == "diffusion":
        given = watched(model, prompt, lambda: chosen.open(model, prompt, **arguments), words=False)
        return float((given.pictures[-1] - sampled(model, prompt, given.rows)).abs().max())
    assert isinstance(prompt, Prompt)
    wanted = model(**prompt.inputs, use_cache=False).logits[0, -1]
    with chosen.open(model, prompt, **arguments):
        return float((model(**prompt.inputs, use_cache=False).logits[0, -1] - wanted).abs().nan_to_num(1).max())


KINDS = ("language", "vision-language", "diffusion")
BARE = [(kind, own.name) for kind in KINDS for own in methods(kind)]


# On a prompt without a picture, and with few layers, no head is found whose sinks could be given away.
NOTHING_FOUND = {("language", "redistribute")}


@pytest.mark.parametrize(("kind", "name"), BARE)
def test_a_bare_name_does_something_or_is_refused_by_name(kind: str, name: str) -> None:
    for marked in (True, False) if kind != "diffusion" else (False,):
        told = outcome(kind, marked, name)
        if told == 0:
            assert (kind, name) in NOTHING_FOUND
            with pytest.raises(ValueError, match=f"{name} changes nothing at all here"):
                method(name).check_changed({}, changed=False)
        else:
            assert isinstance(told, float) or name in told or "--span" in told, told


def test_a_neutral_setting_may_change_nothing() -> None:
    method("boost").check_changed({"factor": 1.0, "span": "text"}, changed=False)
    method("boost").check_changed({}, changed=True)
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        method("boost").check_changed({"factor": 0.5}, changed=False)


def outcome(kind: str, marked: bool, with_: str) -> float | str:
    try:
        return moved(kind, marked, with_)
    except ValueError as error:
        return str(error)


def test_visual_exit_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"visual_exit needs a layer .* visual_exit\[layer=2\], or trained gates"):
        moved("vision-language", False, "visual_exit")
    assert moved("vision-language", False, "visual_exit[layer=2]") > 0
    assert moved("vision-language", False, "visual_exit[layer=0]") == 0
    with pytest.raises(ValueError, match="layer=9: the model has layers 0 to 3; 0 lets no token leave"):
        moved("vision-language", False, "visual_exit[layer=9]")
