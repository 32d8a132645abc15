"""Rank against number of heads: finding the nearest of some points takes one head of full rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from manyheads.explain.studies.drawing import chart, curve_plot
from manyheads.explain.studies.study import (
    Cell,
    Point,
    Study,
    Verdict,
    always,
    average,
    checkpoints,
    register_study,
    said,
    seeded,
)
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


def draw_sphere(rows: int, count: int, dim: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Query [rows, dim] and points [rows, count, dim], uniform on the unit sphere."""
    drawn = torch.randn(rows, count + 1, dim, generator=rng)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    return drawn[:, 0], drawn[:, 1:]


def nearest(query: Tensor, points: Tensor) -> Tensor:
    """[rows, dim]: of the points the one with the largest inner product with the query."""
    best = torch.einsum("bd,bmd->bm", query, points).argmax(1)
    return points[torch.arange(len(points)), best]


class LowRankHeads(nn.Module):
    """sum_h O_h V_h^T X softmax(X^T K_h Q_h^T y), with Q_h, K_h, V_h, O_h of shape [dim, rank]; no scale, no bias."""

    def __init__(self, dim: int, rank: int, heads: int) -> None:
        super().__init__()
        # Scores of unit vectors start of order 1, whatever the rank; outputs add up to order 1 whatever the heads.
        self.q, self.k = (nn.Parameter(torch.randn(heads, dim, rank) / rank**0.25) for _ in range(2))
        self.v = nn.Parameter(torch.randn(heads, dim, rank) / dim**0.5)
        self.o = nn.Parameter(torch.randn(heads, dim, rank) / (heads * rank) ** 0.5)

    def forward(self, query: Tensor, points: Tensor) -> Tensor:
        q = torch.einsum("bd,hdr->bhr", query, self.q)
        k = torch.einsum("bmd,hdr->bhmr", points, self.k)
        weights = torch.einsum("bhr,bhmr->bhm", q, k).softmax(-1)
        mixed = torch.einsum("bhm,bmd->bhd", weights, points)
        return torch.einsum("bhd,hdr,her->be", mixed, self.v, self.o)


@register_study
@dataclass(frozen=True)
class RankHeads(Study):
    """Amsel, Yehudai and Bruna, On the Benefits of Rank in Attention Layers, arXiv:2407.16153.

    Target: f(y; x_1..x_N) = the x_i nearest to y, all on the unit sphere. One head with K Q^T = c I, c large, and
    O V^T = I represents it; of rank r < d the paper needs a number of heads that grows exponentially in d / r.
    Measured: the squared error of a trained layer with H heads of rank r, as a share of that of the best constant (1);
    at the usual H = d / r, and with `more` times as many heads, and so parameters, as the full-rank head has.
    Low ranks at the usual H are stacked to `depths` layers as well, each with its own heads and the residual between.
    Divergence: d = 16 and a few hundred steps of Adam with a decaying rate on fresh draws, attention without MLPs,
    where the paper also trains whole transformer layers at d = 64.
    """

    name = "rank-heads"
    title = "Rank against number of heads"
    claim = (
        "A single full-rank head learns to point at the nearest of some points on the sphere; many low-rank heads with "
        "the same, or several times the, number of parameters do not, nor do two or three layers of them."
    )
    reference = "arXiv:2407.16153"
    simplified = (
        "16 dimensions and 8 points, attention layers without MLP, some hundred steps of Adam on fresh draws. The "
        "paper's bound concerns what can be represented; this is what training finds."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "squared_error": "error",
        "hits": "nearest found",
        "parameters": "parameters",
    }

    dim: int = 16
    count: int = 8
    ranks: tuple[int, ...] = (16, 8, 4, 1)
    more: int = 4
    depths: tuple[int, ...] = (2, 3)
    steps: int = 600
    batch: int = 128
    learning_rate: float = 0.02

    def points(self) -> list[Point]:
        usual = [(rank, max(1, self.dim // rank)) for rank in self.ranks if rank <= self.dim]
        wider = [(rank, heads * self.more) for rank, heads in usual if rank < self.dim]
        flat = [
            {"label": f"rank {r}, {h} head{'s' * (h > 1)}", "rank": r, "heads": h, "budget": b, "depth": 1}
            for b, own in (("equal", usual), (f"{self.more} times", wider))
            for r, h in own
        ]
        deep = [
            {"label": f"rank {r}, {h} heads, {depth} layers", "rank": r, "heads": h, "budget": f"{depth} layers",
             "depth": depth}
            for depth in self.depths if depth > 1
            for r, h in usual if r <= self.dim // 4
        ]  # fmt: skip
        return [*flat, *deep]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        rng = generator(self.name, "train", seed)
        held = draw_sphere(2048, self.count, self.dim, generator(self.name, "eval", seed))
        with seeded(self.name, "weights", point["rank"], point["heads"], seed):
            model = Stacked(self.dim, point["rank"], point["heads"], point["depth"])
        optimiser = torch.optim.Adam(model.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps + 1)
        curve, marks = [], checkpoints(self.steps, 20)
        for step in range(self.steps + 1):
            if step in marks:
                curve.append({"step": step} | evaluate(model, *held))
            query, keys = draw_sphere(self.batch, self.count, self.dim, rng)
            loss = (model(query, keys) - nearest(query, keys)).square().sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        parameters = float(sum(own.numel() for own in model.parameters()))
        return {k: v for k, v in curve[-1].items() if k != "step"} | {"parameters": parameters, "curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        low = [own for own in self.points() if own["rank"] <= self.dim // 4]
        means: dict[str, float] = {}
        pairs = []
        for seed in sorted({cell["seed"] for cell in cells}):
            found = {cell["label"]: float(cell["squared_error"]) for cell in map(labelled, cells)
                     if cell["seed"] == seed}  # fmt: skip
            full = found.get(self.points()[0]["label"])
            if full is None or any(own["label"] not in found for own in low):
                return Verdict(None, {}, ("Not every condition was measured.",))
            pairs.append((min(found[own["label"]] for own in low), full))
        for own in (self.points()[0], *low):
            mean = average(cells, "squared_error", **{key: own[key] for key in ("rank", "heads", "depth")})
            assert mean is not None
            means[own["label"]] = mean
        lines = [said("Error left by the best with at most a quarter of the rank, against full rank", pairs)]
        lines += [f"{label}: {value:.1%} of the best constant's squared error." for label, value in means.items()]
        return Verdict(always(pairs), means, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        words: dict[str, str] = {
            "equal": "as many parameters",
            f"{self.more} times": f"{self.more} times the parameters",
        }
        rows = [{"condition": words.get(c["budget"], c["budget"]), "seed": c["seed"], "rank": c["rank"],
                 "squared_error": round(c["squared_error"], 6)} for c in cells]  # fmt: skip
        drawn = chart(rows, "rank", "squared_error", across="rank of a head", up="share of the error left", log="x")
        text = "1 is the best constant, 0 is perfect. At rank r there are d / r heads, and several times as many."
        return [
            Plot("error-rank", "Error over rank", text, drawn),
            *curve_plot(cells, "squared_error", "Error over training", "On held-out draws.", "share of the error left"),
        ]


class Stacked(nn.Module):
    """Layers one on another: y_l = y_(l-1) + heads_l(y_(l-1); X), of which the last one's heads are the output."""

    def __init__(self, dim: int, rank: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LowRankHeads(dim, rank, heads) for _ in range(depth))

    def forward(self, query: Tensor, points: Tensor) -> Tensor:
        *below, last = self.layers
        for layer in below:
            query = query + layer(query, points)
        return last(query, points)


@torch.no_grad()
def evaluate(model: nn.Module, query: Tensor, points: Tensor) -> dict[str, float]:
    """error: squared error over that of the constant 0, which is 1 on the sphere. hits: how often the output is nearer
    to the right point than to any other."""
    found, target = model(query, points), nearest(query, points)
    chosen = nearest(found, points)
    return {
        "squared_error": float((found - target).square().sum(-1).mean()),
        "hits": float((chosen == target).all(-1).float().mean()),
    }


def labelled(cell: Cell) -> Cell:
    """A cell with the condition that it was stored under."""
    return {"label": cell.get("mechanism"), **cell}
