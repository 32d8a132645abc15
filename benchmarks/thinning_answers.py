"""What the packaged `vlm` answers rightly about held-out scenes when image tokens leave, by kind of question, beside
the share of (layer, image token) pairs that it still had and of keys and values that it held.

DyVTE's gates are trained here by its recipe, on questions of the training scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from vlm import said, share

from common import save
from manyheads.hosts.seeing import Seeing, load_seeing
from manyheads.steer.thinning.aim import merge_and_prune
from manyheads.steer.thinning.exit import ExitGates, fit_exits, gates_for, visual_exit
from manyheads.steer.thinning.mustdrop import must_drop
from manyheads.steer.thinning.tokens import Step, Thinning, thinned
from manyheads.steer.thinning.vmtc import clustered
from manyheads.tasks.scenes import KINDS, held_out, pictures, training_batch

MEASURES = ("src/manyheads/steer/thinning", "src/manyheads/bundled/vlm")
SCENES, STEPS = 64, 60

Way = Callable[[Any], AbstractContextManager[Thinning]]


def exited(layer: int) -> Way:
    return lambda model: visual_exit(model, layer=layer)


def half(step: Step) -> torch.Tensor | None:
    return ~(step.image & (step.places % 2 == 0)) if step.layer == 2 else None


def asked(seeing: Seeing) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of training questions with their answers behind them, and labels of these alone."""
    for step in range(STEPS):
        batch = training_batch(8, 0, step, questions=4)
        rows = [(p, own) for p, each in zip(pictures(batch.pixels), batch.questions, strict=True) for own in each]
        inputs = seeing.inputs([picture for picture, _ in rows], [own.text for _, own in rows])
        told = [seeing.tokenizer(own.answer, add_special_tokens=False)["input_ids"] for _, own in rows]
        width = max(map(len, told))
        answer = torch.tensor([row + [0] * (width - len(row)) for row in told])
        there = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in told])
        yield {
            "input_ids": torch.cat([inputs["input_ids"], answer], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], there], 1),
            "pixel_values": inputs["pixel_values"],
            "labels": torch.cat([torch.full_like(inputs["input_ids"], -100), answer.masked_fill(there == 0, -100)], 1),
        }


def gated(seeing: Seeing) -> ExitGates:
    torch.manual_seed(0)
    gates = gates_for(seeing.model)
    fit_exits(seeing.model, gates, asked(seeing))
    return gates


def ways(seeing: Seeing) -> dict[str, Way]:
    gates = gated(seeing)
    return {
        "nothing leaves": lambda model: thinned(model, lambda step: None),
        "every second before layer 2": lambda model: thinned(model, half),
        **{f"all before layer {layer}": exited(layer) for layer in (1, 2, 3)},
        "DyVTE, trained gates": lambda model: visual_exit(model, gates),
        "AIM, merged once": lambda model: merge_and_prune(model, 1, start=10**6),
        "AIM, merged once, then pruned": lambda model: merge_and_prune(model, 1),
        "MustDrop, thresholds 0.03, no merging": lambda model: must_drop(model, 0.03, 0.03, similarity=2.0),
        "MustDrop, thresholds 0.03": lambda model: must_drop(model, 0.03, 0.03),
        "a quarter and a tenth in clusters (VMTC)": clustered,
        "the same, each word on half of them (CMAI)": lambda model: clustered(model, focused=0.5),
    }


def row(seeing: Seeing, name: str, way: Way) -> dict[str, Any]:
    found: dict[str, Any] = {"way": name}
    patches = seeing.per_picture(seeing.pixels(pictures(held_out(1).pixels)))
    for kind in KINDS:
        with way(seeing.model) as block:
            found[kind] = share(said(seeing, held_out(SCENES, kind=kind)))
        had = torch.tensor(block.image_tokens, dtype=torch.float)
        found.setdefault("image_tokens", float(had.mean()) / patches)
        found.setdefault("held_share", block.held_bytes / block.full_bytes)
    return found


if __name__ == "__main__":
    model = load_seeing()
    save("thinning_answers", "cpu", [row(model, name, way) for name, way in ways(model).items()])
