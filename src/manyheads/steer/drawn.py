"""One run of `manyheads steer` on a model that draws: the same noise without an intervention and with it, as plain
numbers fit for JSON.

Shapes: r rows that are drawn together, c channels, n patches, m words of the caption.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall, edits_heard, opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import tap
from manyheads.steer.diffusion.drawing import Drawing, Rows
from manyheads.steer.method import REFERENCE, Method

# A pixel that is seen to change, of the 2 from black to white.
SEEN = 0.25
# Times and noises at which the model says how well it knows a picture.
KNOWN_AT, NOISES = (0.2, 0.4, 0.6, 0.8), 8


@dataclass
class Drawn:
    """pictures [steps + 1, r, c, height, width]; the caption's own attention: words [steps, m, n] on average over
    layers and heads (of smaller maps each patch repeated), layers: (kind, layer) -> [n, m or n] on average over steps
    and heads; milliseconds of a step, and rows that went through the model in one."""

    rows: Rows
    pictures: list[Tensor] = field(default_factory=list)
    words: Tensor = field(default_factory=lambda: torch.empty(0))
    layers: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    step_ms: float = 0.0
    step_rows: float = 0.0


def steered_drawing(
    loaded: Loaded,
    chosen: Method,
    arguments: Mapping[str, Any],
    drawing: Drawing,
    *,
    wanted: str | None = None,
    sweep: tuple[str, Sequence[Any]] | None = None,
    timed: bool = True,
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, Any]:
    """Draws without and with, whatever the intervention wants drawn beside it included. wanted: a caption whose fit is
    followed. ValueError for what the intervention does not take."""
    check_drawing(loaded, chosen, drawing.caption, drawing.picture is not None)
    model = loaded.model
    model.encode([wanted] if wanted is not None else [])
    tell("opening the intervention", 0.0)

    def begin(own: Mapping[str, Any]) -> Any:
        return chosen.open(model, drawing, **own)

    given = watched(model, drawing, lambda: begin(arguments), told=lambda share: tell("drawing with it", 0.3 * share))
    plain = watched(model, drawing, None, given.rows, told=lambda share: tell("drawing without it", 0.3 + 0.3 * share))
    chosen.check_changed(arguments, not torch.equal(plain.pictures[-1], given.pictures[-1]))
    captions = [drawing.caption, *([wanted] if wanted is not None else [])]
    known = {side: _known(model, own, captions) for side, own in (("without", plain), ("with", given))}
    report = {
        "model": {"name": loaded.name, "class": type(model).__name__, "kind": "diffusion"},
        "method": {
            "name": chosen.name,
            "title": chosen.title,
            "source": chosen.source,
            "arguments": {name: arguments.get(name, default) for name, default in chosen.arguments.items()},
        },
        "drawing": {"caption": drawing.caption, "steps": drawing.steps, "seed": drawing.seed, "wanted": wanted}
        | {"guidance": drawing.guidance, "captions": list(given.rows.captions)},
        "pictures": {"without": rounded(plain.pictures[-1]), "with": rounded(given.pictures[-1])},
        "path": {"without": _path(plain), "with": _path(given)},
        "difference": difference(plain.pictures[-1][:1], given.pictures[-1][:1]),
        "known": known,
        "words": _words(model, drawing, plain, given),
        "moved": _moved(plain, given),
    }
    if timed:
        tell("timing", 0.6)
        report["cost"] = _cost(model, drawing, lambda: begin(arguments), given.rows)
    if sweep is not None:
        key, values = sweep
        points = []
        for number, value in enumerate(values):
            tell(f"{key}={value}", 0.7 + 0.3 * number / len(values))
            own = watched(model, drawing, lambda value=value: begin({**arguments, key: value}), words=False)  # type: ignore[misc]
            points.append(_point(model, value, plain, own, captions, known["without"]))
        report["sweep"] = {"argument": key, "points": points}
    tell("done", 1.0)
    return report


def check_drawing(loaded: Loaded, chosen: Method, caption: str, pictured: bool) -> None:
    if "diffusion" not in chosen.kinds:
        raise ValueError(f"{chosen.name} takes {', '.join(chosen.kinds)} models; {loaded.name} is a diffusion model")
    if pictured and not chosen.takes_picture:
        raise ValueError(
            f"{chosen.name} takes no reference picture (it has no argument {REFERENCE!r}): leave --image out"
        )
    if not caption.strip():
        raise ValueError("the text is empty: give --text a caption")
    loaded.model.encode([caption])


def watched(
    model: Any,
    drawing: Drawing,
    make: Callable[[], Any] | None,
    rows: Rows | None = None,
    *,
    words: bool = True,
    told: Callable[[float], None] = lambda share: None,
) -> Drawn:
    """One drawing with what attended meanwhile. words: whether attention is read at all. told: of each step's
    beginning, by the share of all that is done."""
    with ExitStack() as inside:
        ear = _Ear(model)
        if words:
            inside.enter_context(edits_heard(ear.hear))
        if make is not None:
            rows = inside.enter_context(make())
        assert rows is not None
        found = Drawn(rows)
        if words:
            inside.enter_context(tap(model, ear.read))

        def keep(pictures: Tensor, step: Any) -> Tensor:
            found.pictures.append(pictures)
            told(step.index / step.count)
            return pictures

        found.pictures.append(sampled(model, drawing, rows, watch=keep))
    found.words, found.layers = ear.told(drawing.steps) if words else (found.words, {})
    return found


def sampled(model: Any, drawing: Drawing, rows: Rows, watch: Any = None) -> Tensor:
    pictures: Tensor = model.sample(
        list(rows.captions),
        steps=drawing.steps,
        guidance=drawing.guidance,
        seed=drawing.seed,
        held=rows.held,
        watch=watch,
    )
    return pictures


class _Ear:
    """Attention of the drawing's own row, in the sampler's passes alone: interventions make passes of theirs."""

    def __init__(self, model: Any):
        self.model = model
        self.words: dict[int, list[Tensor]] = {}
        self.layers: dict[tuple[str, int], list[Tensor]] = {}
        self.edited: dict[str, list[tuple[list[int], slice, Tensor]]] = {}

    def row(self, call: AttentionCall) -> int | None:
        step = self.model.step
        count = 0 if step is None else step.captions * (2 if step.guided else 1)
        return None if len(call.query) != count else int(step.conditional.start)

    def hear(self, call: AttentionCall, heads: list[int], rows: slice, weights: Tensor) -> None:
        row = self.row(call)
        if row is not None:
            self.edited.setdefault(call.site.path, []).append((heads, rows, weights[row].detach()))

    @torch.no_grad()
    def read(self, call: Any) -> None:
        own = opened(call, "steer")
        row = self.row(own)
        if row is None:
            return
        weights = own.weights()[row].float()
        for heads, rows, edited in self.edited.pop(own.site.path, []):
            weights[heads, rows] = edited.float()
        mean = weights.mean(0)
        self.layers.setdefault((own.site.kind, own.layer), []).append(mean)
        if own.site.kind == "cross":
            self.words.setdefault(self.model.step.index, []).append(mean.T)

    def told(self, steps: int) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        most = max(own.shape[1] for maps in self.words.values() for own in maps)
        words = torch.stack(
            [torch.stack([_enlarged(own, most) for own in self.words[step]]).mean(0) for step in range(steps)]
        )
        return words, {place: torch.stack(own).mean(0) for place, own in self.layers.items()}


def difference(one: Tensor, two: Tensor) -> dict[str, float]:
    """Root mean square over pixels from -1 to 1, and the share of pixels that are seen to change."""
    change = (two - one).double()
    return {"rms": float(change.square().mean().sqrt()), "pixels": float((change.abs() > SEEN).double().mean())}


def _enlarged(maps: Tensor, patches: int) -> Tensor:
    """[m, n] of square maps, each patch repeated up to so many, whose weights are then those of the patch: a UNet's
    smaller maps beside its largest."""
    small, large = math.isqrt(maps.shape[1]), math.isqrt(patches)
    if small == large:
        return maps
    grid = maps.unflatten(1, (small, small))
    return grid.repeat_interleave(large // small, 1).repeat_interleave(large // small, 2).flatten(1)


@torch.no_grad()
def unknown(model: Any, picture: Tensor, caption: str, seed: int = 1) -> float:
    """How badly the model itself knows a picture [1, c, height, width] under a caption: the mean squared error of its
    velocity at four times and eight noises, the same for every picture. The greater, the less is the picture what the
    model draws for the caption, as in classification by diffusion models (arXiv 2303.16203)."""
    noise = model.noise(NOISES, seed)
    ids, mask = model.encode([caption] * NOISES)
    errors = [
        (model.velocities((1 - t) * picture + t * noise, t, ids, mask) - (noise - picture)).square().mean()
        for t in KNOWN_AT
    ]
    return float(torch.stack(errors).mean())


def _known(model: Any, own: Drawn, captions: Sequence[str]) -> dict[str, float]:
    """Of its caption, of the wanted one where there is one, and of none at all."""
    names = ("caption", "wanted")[: len(captions)]
    last = own.pictures[-1][:1]
    return {
        name: unknown(model, last, caption) for name, caption in zip((*names, "none"), (*captions, ""), strict=True)
    }


def _words(model: Any, drawing: Drawing, plain: Drawn, given: Drawn) -> list[dict[str, Any]]:
    """Of each word: its share of all attention to words, its map over patches on both sides, and how much of the map
    went elsewhere (total variation of the maps as shares of their sum)."""
    ids, _ = model.encode([drawing.caption])
    rows = []
    for place, number in enumerate(ids[0].tolist()):
        maps = {side: own.words.mean(0)[place] for side, own in (("without", plain), ("with", given))}
        before, after = (own / own.sum().clamp_min(1e-12) for own in maps.values())
        rows.append(
            {
                "word": model.config.words[number],
                "share": {side: float(own.mean()) for side, own in maps.items()},
                "moved": float((after - before).abs().sum() / 2),
                "maps": {side: rounded(own) for side, own in maps.items()},
            }
        )
    return rows


def _moved(plain: Drawn, given: Drawn) -> dict[str, list[float]]:
    """kind -> of each layer, how much of a patch's attention went elsewhere: total variation, on average over patches.
    Of the attention on the drawing's own words and patches."""
    found: dict[str, list[float]] = {}
    for kind, layer in sorted(plain.layers):
        change = given.layers[kind, layer] - plain.layers[kind, layer]
        found.setdefault(kind, []).append(float(change.abs().sum(-1).mean() / 2))
    return found


def _cost(model: Any, drawing: Drawing, make: Callable[[], Any], rows: Rows, turns: int = 2) -> dict[str, Any]:
    """Milliseconds of a step, both sides in turns; rows that go through the model in a step, which a busy machine does
    not change. Opening the intervention is not counted."""
    rounds = [[_timed(model, drawing, rows, how) for how in (None, make)] for _ in range(turns)]
    sides = ("without", "with")
    return {
        "turns": turns,
        "step_ms": {side: statistics.median(pair[i][0] for pair in rounds) for i, side in enumerate(sides)},
        "step_ratio": statistics.median(pair[1][0] / pair[0][0] for pair in rounds),
        "step_rows": {side: rounds[-1][i][1] for i, side in enumerate(sides)},
    }


def _timed(model: Any, drawing: Drawing, rows: Rows, make: Callable[[], Any] | None) -> tuple[float, float]:
    counted: list[int] = []
    with ExitStack() as inside:
        if make is not None:
            inside.enter_context(make())
        counting = model.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
        try:
            begun = time.perf_counter()
            sampled(model, drawing, rows)
            ended = time.perf_counter()
        finally:
            counting.remove()
    return (ended - begun) * 1e3 / drawing.steps, sum(counted) / drawing.steps


def _point(
    model: Any, value: Any, plain: Drawn, own: Drawn, captions: Sequence[str], before: Mapping[str, float]
) -> dict[str, Any]:
    """Effect: how much the picture changes, or how much better the wanted caption fits. Damage: how much worse the
    model knows the picture, whatever caption."""
    known = _known(model, own, captions)
    found = {"value": value, **difference(plain.pictures[-1][:1], own.pictures[-1][:1]), "known": known}
    found |= {"lost": known["none"] - before["none"], "picture": rounded(own.pictures[-1][:1])}
    if "wanted" in known:
        found["gained"] = (before["wanted"] - before["caption"]) - (known["wanted"] - known["caption"])
    return found


def _path(own: Drawn) -> list[Any]:
    """The drawing at about eight of its steps, the last one the end."""
    steps = len(own.pictures) - 1
    chosen = sorted({round(i * steps / min(8, steps)) for i in range(min(8, steps) + 1)})
    return [{"step": step, "picture": rounded(own.pictures[step][0])} for step in chosen]


def rounded(values: Tensor) -> Any:
    return np.round(values.detach().double().cpu().numpy(), 4).tolist()
