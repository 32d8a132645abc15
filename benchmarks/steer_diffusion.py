"""The claims of diffusion interventions on the packaged models that draw, with and without:
`python benchmarks/steer_diffusion.py [--model unet] [--captions 24] [--missing] [claim ...]`. Of the transformer the
result is steer_diffusion.json, of the UNet steer_diffusion_unet.json.

Every row: the measure without the intervention and with it, on the same captions and noise in ten steps, and whether
the claim shows (the difference is of the claimed sign and beyond twice its standard error, by pairs).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from dit import captions
from torch import Tensor

from common import RESULTS, once, save
from manyheads.hosts.loading import load_model
from manyheads.hosts.sites import choose
from manyheads.hosts.taps import record
from manyheads.steer.diffusion import (
    borrow_maps,
    box_mask,
    colour_propagation,
    edit_words,
    hunt_heads,
    isolate,
    layers_in,
    layout_guidance,
    merge_concepts,
    multi_reference,
    multi_view,
    perturbed_guidance,
    plug_and_play,
    regional_prompts,
    self_heads,
    space_time,
    until,
)
from manyheads.steer.diffusion.common import on_patches
from manyheads.steer.personal.attencraft import concept_masks
from manyheads.tasks.two_digits import CELL, CELLS, SIZE, cell_of, draw_scene, read_caption, reading, shown

WRITES = ("steer_diffusion", "steer_diffusion_unet")
MEASURES = (
    "src/manyheads/steer/diffusion",
    "src/manyheads/steer/personal/attencraft.py",
    "src/manyheads/bundled/dit",
    "src/manyheads/bundled/unet",
    "src/manyheads/models/flow.py",
)
MODEL: Any = None  # main() loads it
STEPS = 10
LEFT_RIGHT = ("left", "right")


def late_layers() -> list[int]:
    """Where a UNet's papers act, on the way up; of the transformer, all layers but the first."""
    own = self_layers()
    return own[1:] if hasattr(MODEL, "layers") else layers_in(MODEL, "up")


def self_layers() -> list[int]:
    return [site.layer for site in choose(MODEL, kind="self")]


def residual_branch() -> torch.nn.Module:
    branch: torch.nn.Module = MODEL.layers[1].down if hasattr(MODEL, "layers") else MODEL.up[1].residual.second
    return branch


def mask(cell: str) -> Tensor:
    row, column = CELLS[cell]
    return box_mask(MODEL, (row, column, row + CELL, column + CELL))


def each(captions: list[str], draw: Callable[[str, int], Tensor]) -> Tensor:
    return torch.cat([draw(caption, number) for number, caption in enumerate(captions)])


def noise(number: int, count: int = 1) -> Tensor:
    return MODEL.noise(count, 1000 + number)


def real(caption: str, number: int) -> Tensor:
    """A picture of held-out digits, [1, 1, 16, 16]."""
    return torch.from_numpy(draw_scene(caption, np.random.default_rng(number), held_out=True))[None, None]


def right(pictures: Tensor, told: list[str], key: str = "right") -> list[float]:
    return [float(own[key]) for own in shown(pictures, told)]


def in_place(pictures: Tensor, told: list[str], cells: tuple[str, str] = LEFT_RIGHT) -> list[float]:
    """Whether the caption's digits stand in these cells, in order."""
    seen = reading(pictures)
    return [
        float(all(seen[cell][i] == digit for cell, digit in zip(cells, read_caption(caption).digits, strict=True)))
        for i, caption in enumerate(told)
    ]


def row(
    claim: str, number: int, what: str, before: list[float], after: list[float], rises: bool = True
) -> dict[str, Any]:
    change = np.subtract(after, before) * (1 if rises else -1)
    error = float(change.std(ddof=1) / len(change) ** 0.5)
    shows = bool(change.mean() > 2 * error and change.mean() > 0)
    return {
        "row": number, "claim": claim, "measure": what, "count": len(before), "without": float(np.mean(before)),
        "with": float(np.mean(after)), "standard_error": error, "wanted": "rises" if rises else "falls", "shows": shows,
    }  # fmt: skip


def isolation(count: int) -> list[dict[str, Any]]:
    """ "a 3 and a 7", whose subjects run into each other most; the two cells that do not see each other are left and
    right."""
    told = captions("and", count)
    begun = torch.cat([noise(n) for n in range(count)])
    plain = MODEL.sample(told, steps=STEPS, noise=begun)
    with isolate(MODEL, torch.stack([mask(cell) for cell in LEFT_RIGHT])):
        alone = MODEL.sample(told, steps=STEPS, noise=begun)
    claim = "isolation: subjects do not run into each other"
    return [
        row(claim, 30, "both right, of 'a 3 and a 7'", right(plain, told), right(alone, told)),
        row(claim, 30, "one digit twice", right(plain, told, "doubled"), right(alone, told, "doubled"), rises=False),
    ]


def regions(count: int) -> list[dict[str, Any]]:
    """ "a 3 and a 7" stands in any of four arrangements; asked for: the first left, the second right."""
    told, masks = captions("and", count), torch.stack([mask(cell) for cell in LEFT_RIGHT])
    sides = torch.stack([box_mask(MODEL, (0, 0, SIZE, CELL)), box_mask(MODEL, (0, CELL, SIZE, SIZE))])
    centres = [(0.5, 0.25), (0.5, 0.75)]

    def names(caption: str) -> list[str]:
        return [f"a {digit}" for digit in read_caption(caption).digits]

    def placed(caption: str) -> list[str]:
        """Each digit with its place, beside a third one."""
        a, b = read_caption(caption).digits
        other = next(digit for digit in range(10) if digit not in (a, b))
        return [f"a {a} left of a {other}", f"a {b} right of a {other}"]

    def with_(open_: Callable[[str], Any]) -> Tensor:
        def draw(caption: str, number: int) -> Tensor:
            with open_(caption):
                return MODEL.sample([caption], steps=STEPS, noise=noise(number))

        return each(told, draw)

    plain = in_place(each(told, lambda caption, n: MODEL.sample([caption], steps=STEPS, noise=noise(n))), told)
    rows = []
    for claim, number, open_ in (
        ("regional prompts in halves of the picture, 'a 3 left of a 0' and 'a 7 right of a 0'", 62,
         lambda c: regional_prompts(MODEL, placed(c), sides)),
        ("regional prompts 'a 3' and 'a 7' in halves of the picture, weight 0.5", 62,
         lambda c: regional_prompts(MODEL, names(c), sides, weight=0.5)),
        ("regional prompts 'a 3' and 'a 7' in their cells", 62, lambda c: regional_prompts(MODEL, names(c), masks)),
        ("space-time: objects stand where their caption is mixed in, c = 1", 366,
         lambda c: space_time(MODEL, names(c), centres, 1.0, radius=0.3)),
        ("space-time, c = 0.5 as published radius 0.2", 366, lambda c: space_time(MODEL, names(c), centres, 0.5)),
    ):  # fmt: skip
        rows.append(
            row(claim, number, "first left and second right, of 'a 3 and a 7'", plain, in_place(with_(open_), told))
        )

    def merged(caption: str, n: int) -> Tensor:
        with merge_concepts(MODEL, 0, {1: sides[0], 2: sides[1]}):
            return MODEL.sample([caption, *placed(caption)], steps=STEPS, noise=torch.cat([noise(n)] * 3))[:1]

    rows.append(row("merged concepts stay in their masks (branches as in the first row)", 73,
                    "first left and second right, of 'a 3 and a 7'", plain,
                    in_place(each(told, merged), told)))  # fmt: skip
    return rows


def ink_inside(pictures: Tensor) -> list[float]:
    """The share of ink in the left and right cells: 1 for two digits beside each other, half for two on top of each
    other."""
    ink = ((pictures + 1) / 2).clamp(0, 1)[:, 0]
    inside = ink * (mask("left") | mask("right"))
    found: list[float] = (inside.sum((1, 2)) / ink.sum((1, 2))).tolist()
    return found


def layouts(count: int) -> list[dict[str, Any]]:
    """ "a 3 and a 7", which may stand beside or on top of each other, by the layout of a picture of other digits that
    stand beside each other."""
    told = captions("and", count)
    begun = torch.cat([noise(n) for n in range(count)])
    plain = MODEL.sample(told, steps=STEPS, noise=begun)
    scenes = torch.cat([real("a 0 left of a 0", n) for n in range(count)])
    with layout_guidance(MODEL, MODEL.noised(scenes, steps=STEPS, seed=9), strength=3.0, active=until(0.5, STEPS)):
        guided = MODEL.sample(told, steps=STEPS, noise=begun)
    source = "a 8 left of a 5"
    back = MODEL.invert(real(source, 0), [source], steps=STEPS)

    def injected(share: float, feature_share: float) -> Tensor:
        features = residual_branch() if feature_share else None
        layers = None if hasattr(MODEL, "layers") else late_layers()
        with plug_and_play(
            MODEL,
            count,
            active=until(share, STEPS, layers),
            features=features,
            features_active=until(feature_share, STEPS),
        ):
            return MODEL.sample([*told, source], steps=STEPS, noise=torch.cat([begun, back[0]]), held=back)[:-1]

    with borrow_maps(MODEL, count, active=until(0.5, STEPS)):
        borrowed = MODEL.sample([*told, source], steps=STEPS, noise=torch.cat([begun, noise(9999)]))[:-1]
    what, cost = "share of ink in the layout's cells", {"shows": None}
    rows = []
    for claim, number, drawn in (
        ("layout guidance, strength 3, half of the steps", 73, guided),
        ("plug-and-play: attention, half of the steps", 397, injected(0.5, 0)),
        ("plug-and-play: attention and features, 0.8 of the steps", 397, injected(0.8, 0.8)),
        ("borrowed self-attention maps carry the layout, half of the steps", 376, borrowed),
    ):
        rows.append(row(claim, number, what, ink_inside(plain), ink_inside(drawn)))
        rows.append({**row("what it costs", number, "both right", right(plain, told), right(drawn, told)), **cost})
    return rows


def agreement(pictures: Tensor) -> float:
    """Mean correlation of pictures by pairs."""
    flat = pictures.flatten(1)
    found = torch.corrcoef(flat)
    return float(found[~torch.eye(len(flat), dtype=torch.bool)].mean())


def alike(count: int) -> list[dict[str, Any]]:
    """Four samples of one caption from noise of their own: how much alike they are, and whether they stay right."""
    told = captions("relation", count)
    found: dict[str, tuple[list[float], list[float]]] = {}
    views = list(range(4))
    for name, open_ in (
        ("plain", lambda: multi_view(MODEL, views, scale=0)),
        ("views", lambda: multi_view(MODEL, views, scale=0.5)),
        ("frames", lambda: colour_propagation(MODEL, views)),
    ):
        scores, rights = [], []
        for number, caption in enumerate(told):
            with open_():
                pictures = MODEL.sample([caption] * 4, steps=STEPS, noise=noise(number, 4))
            scores.append(agreement(pictures))
            rights.append(float(np.mean(right(pictures, [caption] * 4))))
        found[name] = scores, rights
    rows = []
    for name, claim, number in (
        ("views", "views that attend each other's rows agree (untrained branches, scale 0.5)", 265),
        ("frames", "frames that attend their neighbours agree", 369),
    ):
        rows.append(row(claim, number, "correlation of four samples of a caption", found["plain"][0], found[name][0]))
        rows.append({**row("what it costs", number, "share right", found["plain"][1], found[name][1]), "shows": None})
    return rows


def references(count: int) -> list[dict[str, Any]]:
    """A real 3 as the reference of the left digit: how much alike the drawn one is to it."""
    told = captions("relation", 4 * count)[::4]  # "left of" alone
    scores: list[list[float]] = [[], []]
    rights: list[list[float]] = [[], []]
    for number, caption in enumerate(told):
        other = real(caption, number)
        way = MODEL.noised(other, steps=STEPS, seed=number + 9000)
        start = torch.cat([noise(number), way[0]])
        for place, given in enumerate(({}, {1: mask("left")})):
            with multi_reference(MODEL, 0, given, active=lambda step, layer: layer in late_layers()):
                drawn = MODEL.sample([caption, caption], steps=STEPS, noise=start, held=way)[:1]
            pair = torch.cat([cell_of(drawn, "left"), cell_of(other, "left")])
            scores[place].append(agreement(pair))
            rights[place] += right(drawn, [caption])
    return [
        row(
            "the target's digit takes the looks of its reference", 95, "correlation with the reference's digit", *scores
        ),
        {**row("what it costs", 95, "share right", *rights), "shows": None},
    ]


def perturbed(count: int) -> list[dict[str, Any]]:
    """Without classifier-free guidance, where there is room. The hunt sees other captions and noise than the test."""
    told, tried = captions("relation", count), captions("relation", 90)[-12:]

    def scored(heads: list[tuple[int, int]] | None, asked: list[str], start: int, scale: float) -> list[float]:
        begun = torch.cat([noise(start + n) for n in range(len(asked))])
        with perturbed_guidance(MODEL, heads, scale=scale):
            return right(MODEL.sample(asked, steps=STEPS, guidance=1.0, noise=begun), asked)

    plain = scored(None, told, 0, 0.0)
    hunted = hunt_heads(lambda heads: sum(scored(heads, tried, 7000, 1.0)), self_heads(MODEL), rounds=1, take=3)
    return [
        row("guidance away from all heads put out", 137, "both right, no other guidance", plain,
            scored(None, told, 0, 1.0)),
        row(f"guidance away from hunted heads {hunted} put out", 137, "both right, no other guidance", plain,
            scored(hunted, told, 0, 1.0)),
    ]  # fmt: skip


def words(count: int) -> list[dict[str, Any]]:
    """The second digit's word is erased, or made to count more, of "a 3 and a 7"; place 5 of the caption."""
    told = captions("and", count)

    def there(pictures: Tensor, which: int) -> list[float]:
        seen = reading(pictures)
        return [
            float(any(seen[cell][i] == read_caption(caption).digits[which] for cell in CELLS))
            for i, caption in enumerate(told)
        ]

    begun = torch.cat([noise(n) for n in range(count)])
    plain = MODEL.sample(told, steps=STEPS, noise=begun)
    with edit_words(MODEL, [5], times=0.0):
        erased = MODEL.sample(told, steps=STEPS, noise=begun)
    weak = MODEL.sample(told, steps=STEPS, noise=begun, guidance=1.0)
    with edit_words(MODEL, [2, 5], add=0.1):
        strong = MODEL.sample(told, steps=STEPS, noise=begun, guidance=1.0)
    return [
        row(
            "an erased word is not drawn",
            376,
            "the word's digit is there",
            there(plain, 1),
            there(erased, 1),
            rises=False,
        ),
        {**row("what it costs", 376, "the other digit is there", there(plain, 0), there(erased, 0)), "shows": None},
        row("emphasised digits come out", 376, "both right, unguided", right(weak, told), right(strong, told)),
    ]


def masks_found(count: int) -> list[dict[str, Any]]:
    """Masks of the two digits of a real scene half way into noise, from word maps alone (arg max, threshold 0.1) and
    spread by self attention; the overlap of a mask with its digit's cell, a quarter of the picture."""
    told, scores = captions("relation", count), ([], [])
    for number, caption in enumerate(told):
        x = MODEL.noised(real(caption, number), steps=2, seed=number)[1]
        ids, seen = MODEL.encode([caption])
        with torch.no_grad(), record(MODEL) as calls:
            MODEL.velocities(x, 0.5, ids, seen)
        finest = max(call.query.shape[2] for call in calls)
        fine = [call for call in calls if call.query.shape[2] == finest]
        cross, near = (
            torch.stack([call.weights()[0].mean(0) for call in fine if call.site.kind == kind]).mean(0)
            for kind in ("cross", "self")
        )
        words = [i for i, word in enumerate(caption.split(), 1) if word.isdigit()]
        cells = read_caption(caption).cells
        assert cells is not None
        grid = on_patches("masks", torch.stack([mask(cell) for cell in cells]), near.shape[0])
        for score, affinity in zip(scores, (torch.eye(len(near)), near), strict=True):
            found = concept_masks(cross[:, [*words, 0]].T, affinity)[:-1]
            score.append(float(((found & grid).sum(1) / (found | grid).sum(1)).mean()))
    return [
        row(
            "word maps spread by self attention are masks",
            202,
            "overlap (IoU) of a mask with its digit's cell",
            *scores,
        )
    ]


def cost(count: int) -> list[dict[str, Any]]:
    """The time of a guided sample of `count` captions and of the same with an intervention at every step, by turns; of
    those that edit attention. Guidance away from a copy, and by a layout, make passes of their own."""
    told, sides = captions("and", count), torch.stack([mask(cell) for cell in LEFT_RIGHT])
    opened: dict[str, tuple[int, Callable[[], Any]]] = {
        "isolation": (30, lambda: isolate(MODEL, sides)),
        "regional prompts": (62, lambda: regional_prompts(MODEL, ["a 3", "a 7"], sides)),
        "merged concepts": (73, lambda: merge_concepts(MODEL, 0, {1: sides[0]})),
        "multi-reference": (95, lambda: multi_reference(MODEL, 0, {1: sides[0]})),
        "views": (265, lambda: multi_view(MODEL, [0, 1, 2, 3])),
        "space-time": (366, lambda: space_time(MODEL, ["a 3", "a 7"], [(0.5, 0.25), (0.5, 0.75)], 0.5)),
        "frames": (369, lambda: colour_propagation(MODEL, [0, 1, 2, 3])),
        "words edited": (376, lambda: edit_words(MODEL, [5], times=0.0)),
        "plug-and-play": (397, lambda: plug_and_play(MODEL, 0)),
    }

    def timed(with_: Callable[[], Any] | None) -> float:
        if with_ is None:
            return once(lambda: MODEL.sample(told, steps=STEPS))
        with with_():
            return once(lambda: MODEL.sample(told, steps=STEPS))

    rows = []
    for claim, (number, with_) in opened.items():
        timed(None), timed(with_)
        ratios = sorted(timed(with_) / timed(None) for _ in range(11))
        rows.append({
            "row": number, "claim": f"cost: {claim}", "measure": "time of a step over that of a plain one",
            "count": count, "without": 1.0, "with": ratios[5],
            "standard_error": float(np.std(ratios, ddof=1)) / 11**0.5,
            "wanted": "at most 1.15", "shows": ratios[5] <= 1.15,
        })  # fmt: skip
    return rows


CLAIMS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "isolation": isolation,
    "layouts": layouts,
    "words": words,
    "perturbed": perturbed,
    "regions": regions,
    "references": references,
    "alike": alike,
    "masks": masks_found,
    "cost": cost,
}


def main() -> None:
    global MODEL
    parser = argparse.ArgumentParser()
    parser.add_argument("claims", nargs="*", choices=[[], *CLAIMS], default=[])
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--model", choices=["dit", "unet"], default="dit")
    parser.add_argument("--missing", action="store_true", help="go on where a run stopped: claims without rows alone")
    given = parser.parse_args()
    MODEL = load_model(given.model).model
    name = "steer_diffusion" if given.model == "dit" else f"steer_diffusion_{given.model}"
    results = RESULTS / f"{name}.json"
    kept = (given.claims or given.missing) and results.exists()
    rows = json.loads(results.read_text())["rows"] if kept else []
    done = {own["group"] for own in rows} if given.missing else set()
    for claim in [own for own in given.claims or CLAIMS if own not in done]:
        rows = [own for own in rows if own.get("group") != claim]
        found = CLAIMS[claim](given.captions if claim not in ("references", "alike") else given.captions // 3)
        rows += [{"group": claim, **own} for own in found]
        save(name, "cpu", rows)  # after each, so that a run cut short keeps what it has


if __name__ == "__main__":
    main()
