"""Rank against number of heads: finding the nearest of some points takes one head of full rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from manyheads.explain.studies.drawing import chart, curve_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, average, checkpoints, register_study, seeded
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
    Divergence: d = 16 and a few hundred steps of Adam with a decaying rate on fresh draws, one attention layer without
    an MLP, where the paper also trains whole transformer layers at d = 64.
    """

    name = "rank-heads"
    title = "Rank against number of heads"
    claim = (
        "A single full-rank head learns to point at the nearest of some points on the sphere; many low-rank heads with "
        "the same, or several times the, number of parameters do not."
    )
    reference = "arXiv:2407.16153"
    simplified = (
        "16 dimensions and 8 points, one attention layer without MLP, some hundred steps of Adam on fresh draws. The "
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
    steps: int = 600
    batch: int = 128
    learning_rate: float = 0.02

    def points(self) -> list[Point]:
        usual = [(rank, max(1, self.dim // rank)) for rank in self.ranks if rank <= self.dim]
        wider = [(rank, heads * self.more) for rank, heads in usual if rank < self.dim]
        return [
            {"label": f"rank {r}, {h} head{'s' * (h > 1)}", "rank": r, "heads": h, "budget": b}
            for b, own in (("equal", usual), (f"{self.more} times", wider))
            for r, h in own
        ]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        rng = generator(self.name, "train", seed)
        held = draw_sphere(2048, self.count, self.dim, generator(self.name, "eval", seed))
        with seeded(self.name, "weights", point["rank"], point["heads"], seed):
            model = LowRankHeads(self.dim, point["rank"], point["heads"])
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
        full = average(cells, "squared_error", rank=max(self.ranks))
        low = {own["label"]: average(cells, "squared_error", rank=own["rank"], heads=own["heads"])
               for own in self.points() if own["rank"] <= self.dim // 4}  # fmt: skip
        measured = {label: value for label, value in low.items() if value is not None}
        if full is None or not measured:
            return Verdict(None, {}, ("Not every condition was measured.",))
        best = min(measured, key=lambda label: measured[label])
        numbers = {"full_rank": full, **measured}
        line = (
            f"Of the best constant's squared error the full-rank head leaves {full:.1%}; the best of those with at "
            f"most a quarter of the rank, {best}, leaves {measured[best]:.1%}."
        )
        return Verdict(full < 0.5 * measured[best], numbers, (line,))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        words = {"equal": "as many parameters", f"{self.more} times": f"{self.more} times the parameters"}
        rows = [{"condition": words.get(c["budget"], c["budget"]), "seed": c["seed"], "rank": c["rank"],
                 "squared_error": round(c["squared_error"], 6)} for c in cells]  # fmt: skip
        drawn = chart(rows, "rank", "squared_error", across="rank of a head", up="share of the error left", log="x")
        text = "1 is the best constant, 0 is perfect. At rank r there are d / r heads, and several times as many."
        return [
            Plot("error-rank", "Error over rank", text, drawn),
            *curve_plot(cells, "squared_error", "Error over training", "On held-out draws.", "share of the error left"),
        ]


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
