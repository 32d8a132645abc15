"""Memorisation capacity: how many random labels one attention layer can hold, over heads, context and head size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manyheads.explain.studies.drawing import chart, curve_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, average, checkpoints, register_study, seeded
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


def draw_examples(count: int, context: int, dim: int, classes: int, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [count, dim], the context [context, dim] that all of them share, and a label [count] each; all random."""
    queries = torch.randn(count, dim, generator=rng)
    shared = torch.randn(context, dim, generator=rng)
    return queries, shared, torch.randint(classes, (count,), generator=rng)


class SharedContextHeads(nn.Module):
    """logits = D concat_h(softmax(e Q_h K_h^T E^T / sqrt(d)) E v_h) O: queries e [t, d], context E [n, d], heads of
    size d_h and values of size 1, as in the paper's experiments."""

    def __init__(self, dim: int, heads: int, head_dim: int, classes: int) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(heads, dim, head_dim) / head_dim**0.25) for _ in range(2))
        self.v = nn.Parameter(torch.randn(heads, dim) / dim**0.5)
        self.out = nn.Sequential(nn.Linear(heads, dim), nn.Linear(dim, classes))

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """[h, t, n]."""
        q, k = (torch.einsum("td,hdr->htr", x, w) for x, w in ((queries, self.q), (context, self.k)))
        return (q @ k.transpose(1, 2) / queries.shape[1] ** 0.5).softmax(-1)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        mixed = self.weights(queries, context) @ (context @ self.v.T).T.unsqueeze(-1)
        return self.out(mixed[..., 0].T)


def memorised(right: float, count: int, classes: int) -> float:
    """Examples known beyond those that a guess gets: count (right - 1/c) / (1 - 1/c)."""
    return count * (right - 1 / classes) / (1 - 1 / classes)


def feature_rank(weights: Tensor) -> int:
    """weights [h, t, n] -> the rank of [t, h n]: with values and output free, a layer with these weights fits any
    labels of that many examples, and no more, exactly. At most h (n - 1) + 1, for every head's weights sum to 1."""
    return int(torch.linalg.matrix_rank(weights.double().permute(1, 0, 2).flatten(1), rtol=1e-6))


@register_study
@dataclass(frozen=True)
class Memorisation(Study):
    """Mahdavi, Liao and Thrampoulidis, Memorization Capacity of Multi-Head Attention in Transformers, arXiv:2306.02010.

    One attention layer with H heads over a context of n < d tokens memorises at least H (min(n, d_h) - 1) + 1 examples
    with linearly independent queries. Measured, with one context shared by all examples and random labels: examples
    known after training beyond chance, over H, n and d_h; and, with no training, the rank of the attention weights of
    all heads side by side, which is what a linear read-out can fit.
    Divergence: d = 32, 768 examples of 10 classes and some hundred full-batch steps of Adam, instead of d = 64, 10^4 to
    10^5 examples of 100 classes and days of training; inputs are normal where the released code's are uniform, and go
    in without an embedding.
    """

    name = "memorisation"
    title = "Memorisation capacity of multi-head attention"
    claim = (
        "The number of examples that one attention layer can memorise grows linearly with the number of heads, and "
        "with the context and the head size as long as the latter is below the former."
    )
    reference = "arXiv:2306.02010"
    simplified = (
        "32 dimensions, 768 examples of 10 random classes that share one context, some hundred full-batch steps of "
        "Adam. Training finds less than what the layer could hold; the rank of the untrained weights counts what a "
        "linear read-out can fit."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "memorised": "memorised",
        "accuracy": "accuracy",
        "rank": "rank",
        "bound": "bound",
    }

    dim: int = 32
    examples: int = 768
    classes: int = 10
    heads: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (2, 4, 8, 16)
    head_dims: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 600
    learning_rate: float = 0.02

    def points(self) -> list[Point]:
        h, n, r = self._middle
        made = [(own, n, r) for own in self.heads] + [(h, own, r) for own in self.contexts]
        made += [(h, n, own) for own in self.head_dims]
        return [{"label": f"H {h}, n {n}, d_h {r}", "heads": h, "context": n, "head_dim": r}
                for h, n, r in dict.fromkeys(made)]  # fmt: skip

    @property
    def _middle(self) -> tuple[int, int, int]:
        """Where the three sweeps meet: heads, context and head size."""
        return self.heads[len(self.heads) // 2], self.contexts[len(self.contexts) // 2], max(self.head_dims)

    def _sweeps(self, cells: Sequence[Cell], key: str) -> dict[str, dict[int, float]]:
        """Means of the figure `key` by sweep and swept value, where they were measured."""
        names = ("heads", "context", "head_dim")
        found: dict[str, dict[int, float]] = {}
        for place, (name, values) in enumerate(zip(names, (self.heads, self.contexts, self.head_dims), strict=True)):
            rest = {other: self._middle[i] for i, other in enumerate(names) if i != place}
            means = {value: average(cells, key, **rest, **{name: value}) for value in values}
            found[name] = {value: own for value, own in means.items() if own is not None}
        return found

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        data = draw_examples(
            self.examples, point["context"], self.dim, self.classes, generator(self.name, "data", seed)
        )
        queries, context, labels = data
        with seeded(self.name, "weights", seed):
            model = SharedContextHeads(self.dim, point["heads"], point["head_dim"], self.classes)
        rank = feature_rank(model.weights(queries, context).detach())
        optimiser = torch.optim.Adam(model.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps + 1)
        curve, marks = [], checkpoints(self.steps, 20)
        for step in range(self.steps + 1):
            logits = model(queries, context)
            if step in marks:
                right = float((logits.argmax(-1) == labels).float().mean())
                known = memorised(right, self.examples, self.classes)
                curve.append({"step": step, "accuracy": right, "memorised": known})
            optimiser.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimiser.step()
            schedule.step()
        bound = point["heads"] * (min(point["context"], point["head_dim"]) - 1) + 1
        last = {key: curve[-1][key] for key in ("accuracy", "memorised")}
        return last | {"rank": float(rank), "bound": float(bound), "curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        found = self._sweeps(cells, "memorised")
        if {own["label"] for own in self.points()} - {cell["mechanism"] for cell in cells} or len(self.heads) < 3:
            return Verdict(None, {}, ("Not every condition was measured.",))
        straight = linear_share(list(found["heads"]), list(found["heads"].values()))
        # A head size near the context adds nothing more, and training is noisy: 5% less is no decline.
        grows = {name: rises(list(own.values()), 0.05 if name == "head_dim" else 0.0) for name, own in found.items()}
        titles = {"heads": "Heads", "context": "Context", "head_dim": "Head size"}
        lines = [
            f"{titles[name]} {', '.join(map(str, own))}: {', '.join(f'{v:.0f}' for v in own.values())} memorised: "
            f"{'it grows' if grows[name] else 'it does not grow throughout'}."
            for name, own in found.items()
        ]
        lines.append(f"A line over heads explains {straight:.0%} of the differences.")
        numbers = {f"{name}_{value}": v for name, own in found.items() for value, v in own.items()}
        return Verdict(all(grows.values()) and straight > 0.9, {"linear": straight, **numbers}, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        names = "heads H, context n or head size d_h"
        told = "Examples known after training beyond what guessing gives; the two others keep their middle values."
        free = "Rank of the untrained attention weights of all heads: what a linear read-out can fit exactly."
        return [
            self._sweep_plot(cells, "memorised", "Memorised by training", told, names),
            self._sweep_plot(cells, "rank", "Capacity of a linear read-out", free, names),
            *curve_plot(cells, "accuracy", "Accuracy on the training examples", "Over training.", "accuracy"),
        ]

    def _sweep_plot(self, cells: Sequence[Cell], key: str, title: str, text: str, across: str) -> Plot:
        from manyheads.runs.charts import Plot

        rows = [
            {"condition": f"over {name.replace('_dim', ' size')}", "seed": seed, "value": value, key: round(mean, 3)}
            for seed in sorted({cell["seed"] for cell in cells})
            for name, own in self._sweeps([cell for cell in cells if cell["seed"] == seed], key).items()
            for value, mean in own.items()
        ]
        return Plot(key, title, text, chart(rows, "value", key, across=across, up="examples", log="x"))


def rises(values: Sequence[float], slack: float) -> bool:
    """Ends above where it began, and no value is below the one before by more than a share `slack` of it."""
    return values[-1] > values[0] and all(b > a * (1 - slack) for a, b in pairwise(values))


def linear_share(x: Sequence[float], y: Sequence[float]) -> float:
    """The squared correlation of x and y: the share of y's variance that a line explains."""
    both = torch.tensor([list(x), list(y)], dtype=torch.float64)
    found = float(torch.corrcoef(both)[0, 1])
    return found**2 if found > 0 else 0.0
