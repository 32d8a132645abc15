"""Whether heads found for one task do the same work in another, and what putting them right is worth there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manyheads.explain.detectors.circuit_tasks import CircuitTask, coloured_objects, indirect_object
from manyheads.explain.detectors.patching import Head, PathPatching, circuit, circuit_overlap
from manyheads.explain.studies.drawing import strip_plot
from manyheads.explain.studies.models import ModelStudy
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, paired, register_study, said
from manyheads.hosts.calls import opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import tap

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

ADJUSTED = {
    "none": "heads as they are",
    "circuit": "the other task's heads adjusted",
    "random": "random heads adjusted",
}


@contextmanager
def looking_at(model: Any, heads: Sequence[Head], places: Tensor) -> Iterator[None]:
    """The last query of these heads attends to `places` [b, k] alone, evenly; every other row is as it was."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def reader(call: Any) -> Tensor:
        own = opened(call, "circuit-reuse")
        chosen = by_layer[call.layer]
        values = own.of_heads(own.value, chosen)
        at = places.to(values.device)[:, None, :, None].expand(-1, len(chosen), -1, values.shape[-1])
        output = own.output[:, chosen].clone()
        output[:, :, -1] = values.gather(2, at).mean(2)
        return own.replaced(output, chosen)

    with tap(model, reader, layers=sorted(by_layer), kind="self"):
        yield


def random_heads(like: Sequence[Head], heads: int, seed: int) -> list[Head]:
    """As many others, each in the layer of one of `like`."""
    rng, taken = random.Random(f"heads {seed}"), set(like)
    found: list[Head] = []
    for layer, _ in like:
        head = rng.choice([own for own in range(heads) if (layer, own) not in taken])
        taken.add((layer, head))
        found.append((layer, head))
    return found


@lru_cache(maxsize=1)
def _circuits(loaded: Loaded, rows: int, share: float, screen: int, seed: int) -> tuple[list[list[Head]], ...]:
    found = []
    for make in (indirect_object, coloured_objects):
        task = make(loaded, rows, seed)
        patching = PathPatching(loaded, task.clean, task.corrupted, task.metric)
        found.append(circuit(patching, share=share, screen=screen))
    return tuple(found)


@register_study
@dataclass(frozen=True)
class CircuitReuse(ModelStudy):
    """Merullo et al., Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv:2310.08744.

    A circuit: the 2% of heads with the greatest direct effect on the answer, and the 2% that reach these most, by path
    patching from corrupted prompts (`circuit`). Measured: the share of heads that the circuits of indirect objects and
    of coloured objects have in common, against what sets of that size share by chance; then the second stage's heads
    of the indirect-object circuit, which in the paper inhibit the wrong option, are made to look at the wrong colours
    in coloured objects, evenly, and the accuracy is taken again, and with as many other heads of the same layers.
    Divergence: only heads that a first-order screen puts first are patched; the paper chose its four heads by hand
    (among them a negative one) in GPT-2 medium.
    """

    name = "circuit-reuse"
    title = "Circuits of two tasks share heads"
    claim = (
        "The circuits of indirect-object identification and of coloured objects share more heads than chance, and "
        "making the former's inhibition heads look at the wrong colours raises the accuracy in the latter."
    )
    reference = "arXiv:2310.08744"
    simplified = (
        "A small model in GPT-2 medium's place, prompts of this package's own wording, a first-order screen before "
        "path patching, and heads chosen by their stage in the circuit where the paper chose four by hand."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "accuracy": "accuracy",
        "difference": "logit difference",
        "shared": "shared",
    }

    model: str = "smollm2"
    rows: int = 2
    asked: int = 16
    share: float = 0.02
    screen: int = 8

    def points(self) -> list[Point]:
        return [{"label": label, "adjusted": name} for name, label in ADJUSTED.items()]

    @torch.no_grad()
    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        loaded = self.loaded
        first, second = _circuits(loaded, self.rows, self.share, self.screen, seed)
        task, count = coloured_objects(loaded, self.asked, seed + 1), loaded.config.num_attention_heads
        if point["adjusted"] == "none":
            return _figures(loaded.model, task)
        chosen = first[-1]
        size = {len({head for stage in own for head in stage}) for own in (first, second)}
        chance = max(size) / (loaded.config.num_hidden_layers * count)
        shared = circuit_overlap(first, second).share if point["adjusted"] == "circuit" else chance
        heads = chosen if point["adjusted"] == "circuit" else random_heads(chosen, count, seed)
        with looking_at(loaded.model, heads, task.places):
            return {"shared": shared, **_figures(loaded.model, task)}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        circuit_, none, other = ({"adjusted": name} for name in ("circuit", "none", "random"))
        shared = paired(cells, "shared", circuit_, other)
        raised, beyond = (paired(cells, "accuracy", circuit_, less) for less in (none, other))
        lines = (
            said("Share of the smaller circuit in both, against chance", shared),
            said("Accuracy with the circuit's heads adjusted, against none", raised),
            said("And against other heads adjusted", beyond),
        )
        return Verdict(both_ways([always(own) for own in (shared, raised, beyond)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        return [
            *strip_plot(
                cells, "accuracy", "Coloured objects", "The right colour is the likeliest of three.", "accuracy"
            ),
            *strip_plot(
                cells, "shared", "Shared heads", "Of the smaller circuit; by chance for random heads.", "share"
            ),
        ]


def _figures(model: Any, task: CircuitTask) -> dict[str, float]:
    output = model(input_ids=task.clean, use_cache=False)
    return {"accuracy": task.accuracy(output), "difference": float(task.metric(output).double().mean())}
