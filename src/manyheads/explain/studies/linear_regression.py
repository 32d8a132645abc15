"""In-context linear regression: what the weights of multi-head softmax attention turn into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from manyheads.explain.studies.drawing import curve_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, average, checkpoints, register_study, seeded
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


def draw_prompts(rows: int, count: int, dim: int, noise: float, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, count + 1, dim] normal, of which the last is the query; y [rows, count + 1] = <beta, x> + noise, with
    beta normal of variance 1 / dim; beta [rows, dim]."""
    x = torch.randn(rows, count + 1, dim, generator=rng)
    beta = torch.randn(rows, dim, generator=rng) / dim**0.5
    y = torch.einsum("bld,bd->bl", x, beta) + noise**0.5 * torch.randn(rows, count + 1, generator=rng)
    return x, y, beta


class RegressionHeads(nn.Module):
    """yhat = sum_h <u_h, Z softmax(Z^T W_h z)>: columns of Z are (x_l, y_l), z = (x_q, 0), W_h [d + 1, d + 1] is a
    head's KQ, u_h [d + 1] the last row of its OV, the only one that the answer depends on."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.kq = nn.Parameter(torch.randn(heads, dim + 1, dim + 1) * 0.1)
        self.ov = nn.Parameter(torch.randn(heads, dim + 1) * 0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [b, count + 1, d], y [b, count + 1] (its last entry is not looked at) -> [b]."""
        context = torch.cat([x[:, :-1], y[:, :-1, None]], -1)
        query = torch.cat([x[:, -1], torch.zeros_like(y[:, -1:])], -1)
        # The query meets W_h first: b h numbers of d + 1 each, where keys that met it first would be b l h of them.
        asked = torch.einsum("hef,bf->bhe", self.kq, query)
        mixed = (asked @ context.mT).softmax(-1) @ context
        return torch.einsum("bhe,he->b", mixed, self.ov)


def gradient_step(x: Tensor, y: Tensor, debias: bool) -> Tensor:
    """[b]: (1 / L) sum_l y_l <x_l - m, x_q>, with m the mean of the x_l for the debiased step and 0 for the plain one;
    the prediction of one step of gradient descent from 0, up to the step size."""
    known = x[:, :-1]
    if debias:
        known = known - known.mean(1, keepdim=True)
    return torch.einsum("bl,bld,bd->b", y[:, :-1], known, x[:, -1]) / known.shape[1]


def bayes(x: Tensor, y: Tensor, noise: float) -> Tensor:
    """[b]: the posterior mean's prediction, ridge regression with weight noise * dim."""
    known, dim = x[:, :-1].double(), x.shape[-1]
    gram = known.transpose(1, 2) @ known + noise * dim * torch.eye(dim, dtype=torch.float64)
    right = torch.einsum("bld,bl->bd", known, y[:, :-1].double())
    return torch.einsum("bd,bd->b", torch.linalg.solve(gram, right), x[:, -1].double()).to(x.dtype)


def fitted_step(x: Tensor, y: Tensor, debias: bool) -> tuple[float, float]:
    """(step size, mean squared error) of the best step size on these prompts."""
    step, target = gradient_step(x, y, debias), y[:, -1]
    size = (step * target).sum() / step.square().sum()
    return float(size), float((size * step - target).square().mean())


def pattern_figures(kq: Tensor, ov: Tensor) -> dict[str, float]:
    """kq [h, d + 1, d + 1], ov [h, d + 1]. Heads are weighed by what they write.

    diagonal: share of the squared KQ (of its x-by-x part and its last row; the last column meets a zero) that lies on
    the x-by-x diagonal once that is replaced by its mean, so 1 is w I. last_entry: share of the squared OV in its last
    entry. zero_sum: |sum_h ov_h| / sum_h |ov_h| over last entries, 0 is zero-sum, 1 for a single head. spread: relative
    deviation of the size of w over heads.
    """
    dim = kq.shape[-1] - 1
    share = ov[:, -1].abs() / ov[:, -1].abs().sum()
    block = kq[:, :, :dim]
    scale = kq.diagonal(dim1=1, dim2=2)[:, :dim].mean(-1)
    diagonal = dim * scale.square() / block.square().sum((1, 2))
    size = scale.abs()
    middle = (share * size).sum()
    return {
        "diagonal": float((share * diagonal).sum()),
        "last_entry": float(ov[:, -1].square().sum() / ov.square().sum()),
        "zero_sum": float(ov[:, -1].sum().abs() / ov[:, -1].abs().sum()),
        "spread": float((share * (size - middle).square()).sum().sqrt() / middle),
    }


@register_study
@dataclass(frozen=True)
class LinearRegression(Study):
    """He et al., In-Context Linear Regression Demystified, arXiv:2503.12734.

    A prompt holds (x_l, <beta, x_l> + noise), l = 1..L, and a query x_q. Claim: trained from scratch, every KQ becomes
    w_h I on the x-part, OV keeps its last entry mu_h alone, |w_h| are equal and sum_h mu_h = 0; positive and negative
    heads together are then gradient descent with debiased covariates,
    yhat = (eta / L) sum_l y_l <x_l - mean x, x_q>, which one head cannot be.
    Measured: those shares, and the error beside that of the best debiased and plain step and of the Bayes predictor.
    Divergence: some thousand steps of Adam with a decaying rate, where the paper takes 5 * 10^5; KQ and OV are trained
    as products, as in its analysis, not as factors.
    """

    name = "linear-regression"
    title = "In-context linear regression"
    claim = (
        "Multi-head softmax attention learns diagonal KQ of one size and zero-sum last-entry OV: gradient descent with "
        "debiased covariates, better than one head and within a constant factor of the Bayes risk."
    )
    reference = "arXiv:2503.12734"
    simplified = (
        "5 dimensions, 40 examples, noise variance 0.1 and fresh prompts as in the paper, but 2,000 steps with a "
        "decaying rate instead of hundreds of thousands, and KQ and OV trained as products instead of as factors."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "squared_error": "error",
        "debiased_error": "debiased GD",
        "plain_error": "plain GD",
        "bayes_error": "Bayes",
        "diagonal": "KQ diagonal",
        "last_entry": "OV last",
        "zero_sum": "OV sum",
    }

    dim: int = 5
    examples: int = 40
    noise: float = 0.1
    heads: tuple[int, ...] = (1, 2, 4)
    steps: int = 2000
    batch: int = 256
    learning_rate: float = 0.02

    def points(self) -> list[Point]:
        return [{"label": f"{own} head{'s' * (own > 1)}", "heads": own} for own in self.heads]

    def _draw(self, rows: int, rng: Generator) -> tuple[Tensor, Tensor]:
        return draw_prompts(rows, self.examples, self.dim, self.noise, rng)[:2]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        rng = generator(self.name, "train", seed)
        held = self._draw(8192, generator(self.name, "eval", seed))
        with seeded(self.name, "weights", point["heads"], seed):
            model = RegressionHeads(self.dim, point["heads"])
        optimiser = torch.optim.Adam(model.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps + 1)
        debiased = fitted_step(*held, debias=True)[0] * gradient_step(*held, debias=True)
        curve, marks = [], checkpoints(self.steps, 24)
        for step in range(self.steps + 1):
            if step in marks:
                curve.append({"step": step} | self._figures(model, *held, debiased))
            x, y = self._draw(self.batch, rng)
            loss = (model(x, y) - y[:, -1]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return {k: v for k, v in curve[-1].items() if k != "step"} | self._references(*held) | {"curve": curve}

    @torch.no_grad()
    def _figures(self, model: RegressionHeads, x: Tensor, y: Tensor, debiased: Tensor) -> dict[str, float]:
        """debiased: [b], what the best debiased step predicts of the same prompts."""
        found = model(x, y)
        gap = (found - debiased).square().mean() / debiased.square().mean()
        figures = {"squared_error": float((found - y[:, -1]).square().mean()), "gap_to_debiased": float(gap)}
        return figures | pattern_figures(model.kq, model.ov)

    def _references(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {
            "debiased_error": fitted_step(x, y, debias=True)[1],
            "plain_error": fitted_step(x, y, debias=False)[1],
            "bayes_error": float((bayes(x, y, self.noise) - y[:, -1]).square().mean()),
        }

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        most = max(self.heads)
        keys = (*self.columns, "spread", "gap_to_debiased")
        many = {key: found for key in keys if (found := average(cells, key, heads=most)) is not None}
        one = average(cells, "squared_error", heads=1)
        if len(many) < len(keys) or one is None or most == 1:
            return Verdict(None, {}, ("Not every condition was measured.",))
        shape = many["diagonal"] > 0.9 and many["last_entry"] > 0.9 and many["zero_sum"] < 0.15
        near = many["squared_error"] < 1.1 * many["debiased_error"]
        better = many["squared_error"] < 0.9 * one
        lines = (
            f"Pattern: with {most} heads {many['diagonal']:.0%} of KQ is a multiple of the identity, "
            f"{many['last_entry']:.0%} of OV lies in its last entry, and those sum to {many['zero_sum']:.0%} of their "
            f"size: {'yes' if shape else 'no'}.",
            f"Predictor: error {many['squared_error']:.3f}, debiased gradient descent {many['debiased_error']:.3f}, "
            f"Bayes {many['bayes_error']:.3f}; its predictions differ from the debiased step's by "
            f"{many['gap_to_debiased']:.1%} of their variance: {'yes' if near else 'no'}.",
            f"One head has an error of {one:.3f}: {'worse' if better else 'not clearly worse'}.",
        )
        return Verdict(shape and near and better, {**many, "one_head_error": one}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        known = [(key, average(cells, f"{key}_error")) for key in ("bayes", "debiased", "plain")]
        marks = ", ".join(f"{key} {value:.3f}" for key, value in known if value is not None)
        error = f"Squared error on held-out prompts. References: {marks}."
        diagonal = "Share of the squared KQ that is a multiple of the identity on the covariates."
        zero_sum = "Size of the sum of the last OV entries over heads, relative to the sum of their sizes."
        last = "Share of the squared OV in its last entry, the one that meets y."
        return [
            *curve_plot(cells, "squared_error", "Error", error, "squared error", log="y"),
            *curve_plot(cells, "diagonal", "KQ turns diagonal", diagonal, "share"),
            *curve_plot(cells, "zero_sum", "OV turns zero-sum", zero_sum, "share left"),
            *curve_plot(cells, "last_entry", "OV keeps its last entry", last, "share"),
        ]
