"""What one attention layer learns with frozen random queries and keys: ridge regression on its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.explain.studies.drawing import chart
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, always, both_ways, paired, register_study, said
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

MODELS = {
    "biased": "attention, biased weights",
    "centred": "attention, zero-mean weights",
    "flat": "random features of all tokens",
}


def draw_sets(rows: int, count: int, dim: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Query [rows, dim] and keys [rows, count, dim], uniform on the unit sphere."""
    drawn = torch.randn(rows, count + 1, dim, generator=rng, dtype=torch.float64)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    return drawn[:, 0], drawn[:, 1:]


def target(query: Tensor, keys: Tensor) -> Tensor:
    """[rows]: the mean over keys of (query . key)^3 d^(3/2), which the order of the keys does not change."""
    scale = keys.shape[-1] ** 1.5
    return torch.einsum("bd,bmd->bm", query, keys).pow(3).mean(1) * scale


def attention_features(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """weights [heads, dim, dim], frozen -> [rows, heads * dim]: (1 / N) sum_i relu(q^T W_h k_i) k_i, of which ridge
    learns the values v_h."""
    scores = torch.einsum("bd,hde,bme->bhm", query, weights, keys).relu()
    return torch.einsum("bhm,bme->bhe", scores, keys).flatten(1) / keys.shape[1]


def flat_features(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """weights [features, (N + 1) dim] -> [rows, features]: relu(w . [q; k_1; ..; k_N])."""
    return (torch.cat([query[:, None], keys], 1).flatten(1) @ weights.T).relu()


def draw_weights(heads: int, dim: int, biased: bool, rng: Generator) -> Tensor:
    """[heads, dim, dim] of deviation 1/2, with mean zero or the identity: with the latter relu(q^T W k) leans to keys
    that are like the query."""
    drawn = torch.randn(heads, dim, dim, generator=rng, dtype=torch.float64) / 2
    return drawn + torch.eye(dim, dtype=torch.float64) if biased else drawn


def ridge_error(
    train: Tensor, answers: Tensor, held: Tensor, held_answers: Tensor, penalties: Sequence[float]
) -> float:
    """The squared error on a held-out half, as a share of the answers' variance, at the penalty that is best on the
    other half."""
    middle = train.mean(0)
    x, y = train - middle, answers - answers.mean()
    kernel, cross = x @ x.T, (held - middle) @ x.T
    size, half = kernel.diagonal().mean(), len(held) // 2
    best = (float("inf"), float("inf"))
    for penalty in penalties:
        solved = torch.linalg.solve(kernel + penalty * size * torch.eye(len(x), dtype=x.dtype), y)
        wrong = (cross @ solved + answers.mean() - held_answers).square() / held_answers.var()
        best = min(best, (float(wrong[:half].mean()), float(wrong[half:].mean())))
    return best[1]


@register_study
@dataclass(frozen=True)
class RandomFeatures(Study):
    """Fu et al., What can a Single Attention Layer Learn? A Study Through the Random Features Lens, arXiv:2307.11353.

    f(q; k_1..k_N) = (1 / N) sum_h sum_i relu(q^T W_h k_i) <v_h, k_i> with frozen W_h (queries and keys) and learned
    v_h, by ridge regression. Target: a function of the query averaged over keys, (q . k)^3. Measured: the error on
    held-out draws over the number of samples; against random features of all tokens at once, which do not know that
    the order of keys is none, and W with the mean identity against mean zero.
    Divergence: targets, sizes and the deviation of W are this file's; the paper's W also acts on a constant entry.
    """

    name = "random-features"
    title = "One attention layer with random queries and keys"
    claim = (
        "Of targets that do not depend on the keys' order, an attention layer with frozen random queries and keys "
        "learns more from as many samples than random features of all tokens; biased weights learn more than "
        "zero-mean ones."
    )
    reference = "arXiv:2307.11353"
    simplified = (
        "One target, eight dimensions and eight keys, some hundred samples, and the penalty of ridge regression chosen "
        "on a part of the held-out samples."
    )
    columns: ClassVar[Mapping[str, str]] = {"unexplained": "error at most samples"}

    dim: int = 8
    count: int = 8
    heads: int = 64
    samples: tuple[int, ...] = (100, 200, 400, 800)
    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def points(self) -> list[Point]:
        return [{"label": label, "features": name} for name, label in MODELS.items()]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        rng = generator(self.name, "weights", seed)
        data = draw_sets(max(self.samples), self.count, self.dim, generator(self.name, "train", seed))
        held = draw_sets(1000, self.count, self.dim, generator(self.name, "held", seed))
        if point["features"] == "flat":
            shape = (self.heads * self.dim, (self.count + 1) * self.dim)
            weights = torch.randn(shape, generator=rng, dtype=torch.float64)
            made = [flat_features(*own, weights) for own in (data, held)]
        else:
            weights = draw_weights(self.heads, self.dim, point["features"] == "biased", rng)
            made = [attention_features(*own, weights) for own in (data, held)]
        answers, right = target(*data), target(*held)
        curve = [{"samples": n, "error": ridge_error(made[0][:n], answers[:n], made[1], right, self.penalties)}
                 for n in sorted(self.samples)]  # fmt: skip
        return {"unexplained": curve[-1]["error"], "curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        biased, centred, flat = ({"features": name} for name in MODELS)
        order, bias = (paired(cells, "unexplained", other, biased) for other in (flat, centred))
        lines = (
            said("Error of random features of all tokens, against attention", order),
            said("Error of zero-mean weights, against biased ones", bias),
        )
        return Verdict(both_ways([always(order), always(bias)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        rows = [{"condition": cell["mechanism"], "seed": cell["seed"], "samples": row["samples"],
                 "error": round(row["error"], 6)} for cell in cells for row in cell["curve"]]  # fmt: skip
        drawn = chart(rows, "samples", "error", across="samples", up="share of the variance left", log="xy")
        return [Plot("error", "Error over samples", "Held out; 1 is the best constant.", drawn)]
