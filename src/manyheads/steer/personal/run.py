"""One run of `manyheads steer personalise`: the model without, by plain fine-tuning and by the form, as plain numbers
fit for JSON, and the folder with the model that was made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manyheads.hosts.loading import Loaded
from manyheads.hosts.quiet import quiet
from manyheads.runs.files import check_folder, write_atomically
from manyheads.runs.results import write_json
from manyheads.runs.steps import Progress
from manyheads.steer.diffusion.drawing import pixels_of
from manyheads.steer.drawn import rounded
from manyheads.steer.drawn_report import png
from manyheads.steer.personal.form import Form
from manyheads.steer.personal.measures import MOST, drawings_of_before, measures
from manyheads.steer.personal.subjects import Album, read_album, read_subjects
from manyheads.steer.personal.training import Plan, personalise, with_words

STEPS = 20  # of a drawing
DATA, PAGE = "personalised.json", "personalised.html"


def begun(loaded: Loaded, files: Sequence[Path], typed: Sequence[str], caption: str | None) -> tuple[Any, Album]:
    """The model with the subjects' words, and the pictures that it is to learn."""
    model = loaded.model
    if not hasattr(model, "word_places") or not hasattr(model, "velocities"):
        raise ValueError(
            f"{loaded.name} ({type(model).__name__}) cannot be personalised: give dit, unet or such a model"
        )
    subjects = read_subjects(model, typed)
    base = with_words(model, subjects)
    return base, read_album(base, files, subjects, caption, lambda picture: pixels_of(base, picture))


def personalised(
    base: Any,
    album: Album,
    form: Form,
    arguments: Mapping[str, Any],
    plan: Plan,
    *,
    draw: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Any]:
    """The record of all sides, and the model that the form made. draw: captions that every side draws, the same noise
    for all; the pictures' own by default. Where the arguments are the form's neutral ones, plain is what it made."""
    shown = list(draw) or [*dict.fromkeys(album.captions)][:MOST]
    base.encode(shown)
    seen = progress or Progress()
    whole = {**form.arguments, **arguments}
    plain = form.plain(whole)
    sides: dict[str, Any] = {"without": base}
    with seen.measure("plain fine-tuning") as tell:
        sides["plain"] = personalise(base, album, form, plain, plan, tell=tell)
    sides[form.name] = sides["plain"]
    if plain != whole:
        with seen.measure(form.name) as tell:
            sides[form.name] = personalise(base, album, form, whole, plan, tell=tell)
    seed = plan.seed
    before = drawings_of_before(base, album, steps=STEPS, seed=seed)
    record = {
        "method": {"name": form.name, "title": form.title, "source": form.source, "arguments": whole}
        | {"steps": plan.steps, "batch": plan.batch, "rate": plan.rate or form.rate, "seed": seed},
        "subjects": [{"word": own.word, "origin": own.origin} for own in album.subjects],
        "pictures": [
            {"name": name, "caption": caption, "picture": rounded(picture)}
            for name, caption, picture in zip(album.names, album.captions, album.pictures, strict=True)
        ],
        "measures": {side: measures(own, album, before, steps=STEPS, seed=seed) for side, own in sides.items()},
        "drawn": {"captions": shown, "steps": STEPS, "seed": seed}
        | {side: rounded(own.sample(shown, steps=STEPS, seed=seed)) for side, own in sides.items()},
    }
    return record, sides[form.name]


def save(record: Mapping[str, Any], model: Any, out: Path, page: Callable[[Mapping[str, Any], Path], Path]) -> None:
    """The folder whole or not at all: the model as `from_pretrained` and every command opens it, the record, the page
    and the drawings. What was there (`check_out`) stays until then."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(draft)
        write_json(record, draft / DATA)
        page(record, draft / PAGE)
        for number, own in enumerate(record["drawn"][record["method"]["name"]]):
            write_atomically(draft / f"drawn-{number}.png", png(own))
        if out.exists():
            shutil.rmtree(out)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_out(out: Path, model: str) -> None:
    """ValueError where --out takes nothing, is the model's own folder, or holds what no run of this command wrote."""
    check_folder(out)
    if out.is_dir() and any(out.iterdir()) and not (out / DATA).is_file():
        raise ValueError(f"--out {out} holds other things: give an empty or a new folder")
    if out.is_dir() and out.resolve() in (Path.cwd(), Path(model).resolve()):
        raise ValueError(f"--out {out} is the folder of the model, or that you are in: give another one")
