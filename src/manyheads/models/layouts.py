"""What a hierarchy for images is made of, as JSON: stem, stages, head, with every setting and its default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manyheads.near import suggest

NO_MIXER = "none"  # among a stage's mixers: a block that is its MLP alone
STEP = {"kernel": 2, "stride": 2, "padding": 0, "features": None, "before": "none", "after": "none", "act": "none"}
STEP |= {"bias": True, "groups": 1, "norm_eps": None, "deforms": False, "pool": False}
STAGE = {"dim": None, "depth": 1, "heads": 1, "mixers": None, "whole": False, "norm": "layer", "norm_eps": 1e-6}
STAGE |= {"mlp": "plain", "mlp_ratio": 4.0, "layer_scale": None, "down": None, "between": None, "norm_end": "none"}
STAGE |= {"positions": None, "bottleneck": None}
HEAD = {"norm": "layer", "norm_eps": 1e-6, "hidden": 0, "act": "gelu", "norm_hidden": False, "token": None}
TOKEN = {"depth": 1, "heads": 1, "mlp_ratio": 4.0, "bias": False, "begins": "learnt", "moves": "token", "dense": False}
LAYOUT: dict[str, Any] = {"stem": [], "stages": [], "head": {}}


def checked_layout(stages: Any) -> dict[str, Any]:
    """What `stages` says of a hierarchy, defaults filled in. Raises ValueError, naming the place, for what no
    hierarchy has."""
    layout = _filled("stages", stages, LAYOUT)
    layout["stem"] = [_filled(f"stem[{i}]", step, STEP) for i, step in enumerate(layout["stem"])]
    layout["head"] = _filled("head", layout["head"], HEAD)
    if layout["head"]["token"] is not None:
        layout["head"]["token"] = _filled("head.token", layout["head"]["token"], TOKEN)
        _one_of("head.token", layout["head"]["token"], begins=("learnt", "mean"), moves=("token", "all"))
    if not layout["stages"] or not layout["stem"]:
        raise ValueError("stages: want a stem of at least one step and at least one stage")
    layout["stages"] = [_filled(f"stages[{i}]", stage, STAGE) for i, stage in enumerate(layout["stages"])]
    for i, stage in enumerate(layout["stages"]):
        place = f"stages[{i}]"
        if stage["down"] is not None:
            stage["down"] = _filled(f"{place}.down", stage["down"], STEP)
        if not isinstance(stage["mixers"], Sequence) or isinstance(stage["mixers"], str) or not stage["mixers"]:
            raise ValueError(f"{place}.mixers is {stage['mixers']!r}; want a list of specs, taken in turn")
        _one_of(place, stage, norm=("layer", "batch"), mlp=("plain", "convolved"))
        _narrowed(place, stage)
        sides = stage["positions"]
        if sides is not None and not (
            isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides)
        ):
            raise ValueError(f"{place}.positions={sides!r}; want [height, width] of the map that has a vector per cell")
    return layout


def _narrowed(place: str, stage: Mapping[str, Any]) -> None:
    ratio = stage["bottleneck"]
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"{place}.bottleneck={ratio!r}; want the part of dim inside a block, above 0 and up to 1")
    if stage["down"] is not None or NO_MIXER in stage["mixers"]:
        raise ValueError(
            f"{place}: a bottleneck steps down by its mixers' stride, and has one in each block; want down=None and no "
            f"{NO_MIXER!r} among the mixers"
        )


def _one_of(place: str, given: Mapping[str, Any], **known: Sequence[str]) -> None:
    for what, values in known.items():
        if given[what] not in values:
            raise ValueError(f"{place}.{what}={given[what]!r}; want one of {list(values)}")


def _filled(place: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{place} is {given!r}; want a mapping with some of {list(defaults)}")
    for name in given:
        if name not in defaults:
            raise ValueError(f"{place} has no {name!r}{suggest(str(name), list(defaults))}; want {list(defaults)}")
    return {**defaults, **given}
