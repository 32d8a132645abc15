"""Steering in the app: which interventions take its model, with what arguments, and a run of one of them without and
with, small enough for a slider."""

from __future__ import annotations

import base64
import binascii
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from manyheads.hosts.image_files import read_image
from manyheads.hosts.loading import Loaded
from manyheads.steer.asked import arguments as read_arguments
from manyheads.steer.diffusion.drawing import Drawing, pixels_of
from manyheads.steer.method import Method, method, methods
from manyheads.steer.prompting import kind_of, picture_prompt, text_prompt

MOST_IMAGE, MOST_NEW, MOST_STEPS = 600_000, 64, 40
# Kinds that a form can feed: pairs of towers answer nothing that could be shown.
RUN = ("language", "vision-language", "diffusion")
Tell = Callable[[str, float], None]


def steer_facts(loaded: Loaded) -> dict[str, Any] | None:
    """What the form offers; None where no intervention takes the model. Those that cannot do without a file of the
    server's are left out: no path comes in by the network."""
    kind = kind_or_none(loaded.model)
    if kind not in RUN:
        return None
    offered = [own for own in methods(kind) if not set(own.files) & set(own.needs)]
    return {"kind": kind, "methods": [_told(own) for own in offered]}


def kind_or_none(model: Any) -> str | None:
    try:
        return kind_of(model)
    except ValueError:
        return None


def _told(own: Method) -> dict[str, Any]:
    hints = get_type_hints(own.open)
    empty = inspect.Parameter.empty
    arguments = [
        {
            "name": name,
            "default": None if default is empty or default is None else _typed(default),
            "needed": default is empty,
            "whole": int in (get_args(hints[name]) or (hints[name],)),
        }
        for name, default in own.arguments.items()
        if name not in own.files
    ]
    return {
        "name": own.name,
        "title": own.title,
        "source": own.source,
        "notes": re.sub(r"\s+", " ", inspect.getdoc(own.open) or ""),
        "arguments": arguments,
        "neutral": {name: _typed(value) for name, value in own.neutral.items()},
        "strength": own.strength,
        "reach": own.reach,
        "picture": own.takes_picture,
    }


def _typed(value: Any) -> str:
    """As it would be typed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def steer_run(
    loaded: Loaded,
    name: str,
    typed: Mapping[str, str],
    text: str,
    *,
    marks: Sequence[str] = (),
    image: str | None = None,
    new: int = 16,
    steps: int = 20,
    seed: int = 0,
    tell: Tell = lambda what, share: None,
) -> dict[str, Any]:
    """What changed, as the app shows it. typed: arguments as they were typed. image: base64 of a picture's file.
    ValueError, in words for whoever typed it, for all that does not fit."""
    chosen = method(name)
    barred = sorted(set(chosen.files) & set(typed))
    if barred:
        raise ValueError(f"{name}: {barred[0]} names a file, which is given from the command line: `manyheads steer`")
    arguments = read_arguments(chosen, typed)
    picture = None if image is None else _picture(image)
    kind = kind_of(loaded.model)
    if kind == "diffusion":
        return _drawn(loaded, chosen, arguments, text, picture, steps, seed, tell)
    return _answered(loaded, kind, chosen, arguments, text, picture, marks, new, tell)


def _drawn(
    loaded: Loaded,
    chosen: Method,
    arguments: Mapping[str, Any],
    text: str,
    picture: Any,
    steps: int,
    seed: int,
    tell: Tell,
) -> dict[str, Any]:
    from manyheads.steer.drawn import check_drawing, steered_drawing
    from manyheads.steer.drawn_report import headline

    check_drawing(loaded, chosen, text, picture is not None)
    pixels = None if picture is None else pixels_of(loaded.model, picture)
    drawing = Drawing(text, steps=steps, seed=seed, picture=pixels)
    record = steered_drawing(loaded, chosen, arguments, drawing, timed=False, tell=tell)
    return {
        "headline": headline(record),
        "captions": record["drawing"]["captions"],
        "pictures": record["pictures"],
        "words": record["words"],
    }


def _answered(
    loaded: Loaded,
    kind: str,
    chosen: Method,
    arguments: Mapping[str, Any],
    text: str,
    picture: Any,
    marks: Sequence[str],
    new: int,
    tell: Tell,
) -> dict[str, Any]:
    from manyheads.steer.report import headline
    from manyheads.steer.run import steered

    if picture is None:
        if kind != "language":
            raise ValueError(f"{loaded.name} is a {kind} model: choose a picture for it to read")
        prompt = text_prompt(loaded, text, marks)
    else:
        from manyheads.hosts.seeing import seen_by

        prompt = picture_prompt(seen_by(loaded), picture, text, marks)
    record = steered(loaded, chosen, arguments, prompt, kind=kind, new=new, timed=False, tell=tell)
    return {
        "headline": headline(record),
        "answers": record["answers"],
        "next": record["next"]["tokens"],
        "attention": record["attention"],
    }


def _picture(text: str) -> Any:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("the picture did not come in whole: choose it again") from None
    return read_image(data, "the picture")
