"""How concentrated attention is over temperatures: entropy and spectral gap of softmax and of linear attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manyheads.explain.detectors.patterns import spectral_gaps
from manyheads.explain.studies.drawing import chart
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, always, both_ways, paired, register_study, said
from manyheads.mechanisms.linear.lln import OFFSET, SLOPE
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

FORMS = {"lln": "linear log-normal, matched", "elu": "linear, elu + 1", "relu": "linear, relu"}


def attention(form: str, q: Tensor, k: Tensor) -> Tensor:
    """[n, m] weights whose rows sum to one; softmax with the scale d^-1/2."""
    if form == "softmax":
        return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
    if form == "lln":
        wanted = (((q.std() * k.std()).square() - OFFSET) / (2 * SLOPE)).sqrt()
        q, k = ((t * wanted / t.std()).exp() for t in (q, k))
    elif form == "elu":
        q, k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    else:
        q, k = (t.relu() + 1e-6 for t in (q, k))
    weights = q @ k.T
    return weights / weights.sum(-1, keepdim=True)


def concentration(weights: Tensor) -> dict[str, float]:
    """entropy: mean over rows, in nats. gap: 1 - |second eigenvalue|."""
    return {"entropy": float(torch.special.entr(weights).sum(-1).mean()), "gap": float(spectral_gaps(weights))}


@register_study
@dataclass(frozen=True)
class Concentration(Study):
    """Nahshan et al., Linear Log-Normal Attention with Unbiased Concentration, arXiv:2311.13541.

    Normal queries and keys of standard deviation s: a large s is a low temperature. Measured: the entropy of rows and
    the spectral gap of the matrix over s, and how far each form is from softmax, the mean over s of the difference's
    size. Divergence: independent queries and keys, none of a trained model's; without the block-diagonal half.
    """

    name = "concentration"
    title = "Concentration over temperatures"
    claim = (
        "The entropy and the spectral gap of log-normal linear attention follow those of softmax attention over "
        "temperatures; those of linear attention with elu + 1 or relu hardly move."
    )
    reference = "arXiv:2311.13541"
    simplified = "Independent normal queries and keys in place of a trained model's, without the block-diagonal half."
    columns: ClassVar[Mapping[str, str]] = {"entropy_off": "entropy off", "gap_off": "gap off"}

    tokens: int = 192
    dim: int = 32
    deviations: tuple[float, ...] = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)

    def points(self) -> list[Point]:
        return [{"label": label, "form": form} for form, label in FORMS.items()]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        drawn = torch.randn(2, self.tokens, self.dim, generator=generator(self.name, seed), dtype=torch.float64)
        curve = []
        for s in self.deviations:
            soft, own = (concentration(attention(form, *(s * drawn))) for form in ("softmax", point["form"]))
            curve.append({"s": s} | own | {f"softmax_{key}": value for key, value in soft.items()})
        off = {f"{key}_off": sum(abs(row[key] - row[f"softmax_{key}"]) for row in curve) / len(curve)
               for key in ("entropy", "gap")}  # fmt: skip
        return off | {"curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        parts, lines = [], []
        for key, word in (("entropy_off", "Entropy"), ("gap_off", "Spectral gap")):
            for form in ("elu", "relu"):
                pairs = paired(cells, key, {"form": form}, {"form": "lln"})
                parts.append(always(pairs))
                lines.append(said(f"{word} of {form} from softmax's, against log-normal's", pairs))
        return Verdict(both_ways(parts), {}, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        found = []
        for key, up, text in (("entropy", "nats", "Mean over rows."), ("gap", "gap", "1 - |second eigenvalue|.")):
            rows = [{"condition": cell["mechanism"], "seed": cell["seed"], "s": row["s"], key: round(row[key], 6)}
                    for cell in cells for row in cell["curve"]]  # fmt: skip
            rows += [{"condition": "softmax", "seed": cell["seed"], "s": row["s"], key: round(row[f"softmax_{key}"], 6)}
                     for cell in cells if cell["form"] == "lln" for row in cell["curve"]]  # fmt: skip
            drawn = chart(rows, "s", key, across="deviation of queries and keys", up=up)
            found.append(Plot(key, up.capitalize() if key == "gap" else "Entropy", text, drawn))
        return found
