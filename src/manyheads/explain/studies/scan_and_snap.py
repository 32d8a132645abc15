"""Scan and snap: attention leaves common tokens, favours frequent distinct ones, and then slows down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manyheads.explain.studies.drawing import chart, curve_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, average, register_study, seeded
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


def token_chances(common: int, distinct: int, classes: int) -> Tensor:
    """[classes, common + classes * distinct]: P(token | next token). Common tokens weigh 1 for every class; a class'
    own tokens 0.1 to 1 in equal steps, as in the released code."""
    table = torch.zeros(classes, common + classes * distinct)
    table[:, :common] = 1.0
    for own in range(classes):
        first = common + own * distinct
        table[own, first : first + distinct] = torch.linspace(0.1, 1.0, distinct)
    return table / table.sum(1, keepdim=True)


def draw_contexts(chances: Tensor, rows: int, length: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Tokens [rows, length] and the class [rows] that they were drawn for; the query token is the same everywhere."""
    classes = torch.randint(len(chances), (rows,), generator=rng)
    return torch.multinomial(chances[classes], length, replacement=True, generator=rng), classes


class OneLayer(nn.Module):
    """logits = Y normalise(sum_t softmax_t(z[x_t]) onehot(x_t)): z [m] are the attention logits of the one query token
    for every key token, Y [classes, m] is the decoder; normalise divides by the norm. No positions, no residual."""

    def __init__(self, tokens: int, classes: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.empty(tokens).uniform_(-1, 1) / tokens**0.5)
        self.y = nn.Parameter(torch.empty(classes, tokens).uniform_(-1, 1) / tokens**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.z[tokens].softmax(-1)
        mixed = torch.zeros(len(tokens), len(self.z)).scatter_add(1, tokens, weights)
        return (mixed / mixed.norm(dim=1, keepdim=True)) @ self.y.T


def attention_over(chances: Tensor, z: Tensor) -> Tensor:
    """[classes, m]: c(l | n) = P(l | n) exp(z_l) / sum, the attention that a long context of class n gives to l."""
    weighed = chances * z.exp()
    return weighed / weighed.sum(1, keepdim=True)


def scan_figures(chances: Tensor, z: Tensor, common: int) -> dict[str, float]:
    """common: attention on common tokens. frequent: on the half of the distinct tokens that is more frequent, as a
    share of that on all distinct ones. entropy: of c, in nats. order: the rank correlation of z with P(l | n) over a
    class' distinct tokens. spread: the deviation of z over all tokens. Means over classes."""
    found = attention_over(chances, z)
    entropy = -(found * found.clamp_min(1e-30).log()).sum(1).mean()
    distinct = (chances.shape[1] - common) // len(chances)
    shares, orders = [], []
    for own in range(len(chances)):
        span = slice(common + own * distinct, common + (own + 1) * distinct)
        part = found[own, span]
        shares.append(float(part[distinct // 2 :].sum() / part.sum()))
        orders.append(rank_correlation(z[span], chances[own, span]))
    return {
        "common": float(found[:, :common].sum(1).mean()),
        "frequent": sum(shares) / len(shares),
        "entropy": float(entropy),
        "order": sum(orders) / len(orders),
        "spread": float(z.std()),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([own.argsort().argsort().double() for own in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@register_study
@dataclass(frozen=True)
class ScanAndSnap(Study):
    """Tian et al., Scan and Snap, arXiv:2305.16380.

    One query token, `classes` next tokens; a context mixes common tokens with those of its next token. Claims: starting
    uniform, attention c(l | n) prop. to P(l | n) exp(z_l) leaves common tokens; among distinct ones it favours those
    that occur more often; growth slows down after a while (snap); the slower the decoder's rate eta_Y is relative to
    the attention's eta_Z, the further it gets, down to lower entropy.
    Measured: those shares over training and at its end, for several eta_Y / eta_Z; slowing: the growth of the spread of
    z per step in the last half of training over that in the first tenth.
    Divergence: the released code's model and data (two next tokens, ten common, ten distinct each, length 127, momentum
    0.9, both in logits Y and Z), 200 steps instead of 100.
    """

    name = "scan-and-snap"
    title = "Scan and snap in a one-layer transformer"
    claim = (
        "Attention moves from common to distinct tokens, and among those to the frequent ones, then nearly stops; a "
        "decoder that learns faster relative to attention stops it earlier, at a higher entropy."
    )
    reference = "arXiv:2305.16380"
    simplified = (
        "The released code's synthetic data and its model in pairwise logits, with one query token; 200 steps. The "
        "paper's theorems assume long contexts and a fixed ratio of rates; here contexts have 127 tokens and SGD has "
        "momentum 0.9, as in the released runs."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "common": "on common",
        "frequent": "on frequent",
        "order": "order",
        "entropy": "entropy",
        "slowing": "late growth",
    }
    seeds = 5

    common: int = 10
    distinct: int = 10
    classes: int = 2
    length: int = 127
    steps: int = 200
    batch: int = 128
    rate_z: float = 1.0
    ratios: tuple[int, ...] = (1, 2, 5, 10)

    def points(self) -> list[Point]:
        return [{"label": f"eta_Y / eta_Z = {own}", "ratio": own} for own in self.ratios]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        chances = token_chances(self.common, self.distinct, self.classes)
        rng = generator(self.name, "train", seed)
        with seeded(self.name, "weights", seed):
            model = OneLayer(chances.shape[1], self.classes)
        optimiser = torch.optim.SGD(
            [{"params": [model.z], "lr": self.rate_z}, {"params": [model.y], "lr": self.rate_z * point["ratio"]}],
            momentum=0.9,
        )
        curve = []
        for step in range(self.steps + 1):
            curve.append({"step": step} | scan_figures(chances, model.z.detach(), self.common))
            tokens, classes = draw_contexts(chances, self.batch, self.length, rng)
            loss = F.cross_entropy(model(tokens), classes)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        last = {key: value for key, value in curve[-1].items() if key != "step"}
        return last | {"slowing": slowing(curve), "loss": loss.item()} | {"curve": curve[:: max(1, self.steps // 50)]}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        low, high = min(self.ratios), max(self.ratios)
        at = {(key, ratio): average(cells, key, ratio=ratio)
              for key in ("common", "frequent", "order", "entropy", "slowing") for ratio in (low, high)}  # fmt: skip
        values = {f"{key}_{ratio}": value for (key, ratio), value in at.items() if value is not None}
        if len(values) < len(at) or low == high:
            return Verdict(None, values, ("Not every condition was measured.",))
        chances = token_chances(self.common, self.distinct, self.classes)
        start = scan_figures(chances, torch.zeros(chances.shape[1]), self.common)
        common, frequent = values[f"common_{low}"], values[f"frequent_{low}"]
        scans = common < 0.8 * start["common"] and frequent > start["frequent"] and values[f"order_{low}"] > 0.5
        snaps = values[f"slowing_{low}"] < 0.2
        ordered = values[f"entropy_{low}"] < values[f"entropy_{high}"]
        lines = (
            f"Scan: from {start['common']:.0%} on common tokens to {common:.0%}; of what is on distinct ones the "
            f"frequent half goes from {start['frequent']:.0%} to {frequent:.0%}, rank correlation of logits with "
            f"frequency {values[f'order_{low}']:.2f}: {'yes' if scans else 'no'}.",
            f"Snap: in the last half logits grow at {abs(values[f'slowing_{low}']):.1%} of their first rate: "
            f"{'yes' if snaps else 'no'}.",
            f"Rates: entropy {values[f'entropy_{low}']:.2f} at eta_Y / eta_Z = {low}, {values[f'entropy_{high}']:.2f} "
            f"at {high}, {start['entropy']:.2f} before training: {'yes' if ordered else 'no'}.",
        )
        return Verdict(scans and snaps and ordered, values, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        rows = [{"condition": "end of training", "seed": c["seed"], "ratio": c["ratio"],
                 "entropy": round(c["entropy"], 6)} for c in cells]  # fmt: skip
        drawn = chart(rows, "ratio", "entropy", across="eta_Y / eta_Z", up="nats", log="x")
        share = "Expected share of a long context's attention on tokens that both next tokens have."
        frequent = "Of the attention on a next token's own tokens, the share of the more frequent half."
        spread = "Standard deviation of the attention logits: steep at first, then nearly flat."
        return [
            *curve_plot(cells, "common", "Attention leaves common tokens", share, "share"),
            *curve_plot(cells, "frequent", "Frequent distinct tokens are favoured", frequent, "share"),
            *curve_plot(cells, "spread", "Growth slows down", spread, "spread of logits"),
            Plot("entropy-ratio", "Entropy by ratio of learning rates", "Of the attention, one line per seed.", drawn),
        ]


def slowing(curve: Sequence[dict[str, float]]) -> float:
    """Growth of `spread` per step over the last half of training, relative to the first tenth."""
    last, early = len(curve) - 1, max(1, (len(curve) - 1) // 10)
    first = (curve[early]["spread"] - curve[0]["spread"]) / early
    late = (curve[last]["spread"] - curve[last // 2]["spread"]) / max(1, last - last // 2)
    return late / first if first > 0 else 1.0
