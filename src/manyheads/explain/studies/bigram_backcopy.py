"""Sinks in the bigram-backcopy task: an attention head that is active for some tokens and dormant for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from manyheads.explain.studies.drawing import curve_plot
from manyheads.explain.studies.study import (
    Cell,
    Point,
    Study,
    Verdict,
    always,
    average,
    both_ways,
    checkpoints,
    paired,
    register_study,
    said,
    seeded,
)
from manyheads.explain.studies.tiny import Look, TinyTransformer, shares
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

START = 0  # <s>, first in every sequence and nowhere else


@dataclass(frozen=True)
class Bigrams:
    """table: [v, v] transition probabilities between tokens (never to or from <s>). first: [v] of the token after <s>.
    triggers: [v] boolean."""

    table: Tensor
    first: Tensor
    triggers: Tensor


def draw_bigrams(vocab: int, triggers: int, rng: Generator) -> Bigrams:
    """Log-normal transitions; the triggers are the most frequent tokens, as in the paper, and never come first: a
    trigger after a trigger would be copied for ever."""
    weights = torch.randn(vocab, vocab, generator=rng, dtype=torch.float64).mul(1.5).exp()
    weights[START], weights[:, START] = 0, 0
    table = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    often = torch.zeros(vocab, dtype=torch.float64)
    often[1:] = 1 / (vocab - 1)
    for _ in range(200):
        often = often @ table
    chosen = torch.zeros(vocab, dtype=torch.bool)
    chosen[often.topk(triggers).indices] = True
    first = often.masked_fill(chosen, 0)
    return Bigrams(table.float(), (first / first.sum()).float(), chosen)


def draw_sequences(bigrams: Bigrams, rows: int, length: int, rng: Generator) -> Tensor:
    """[rows, length]: <s>, then a Markov chain in which every trigger is followed by the token before it."""
    tokens = torch.full((rows, length), START)
    tokens[:, 1] = torch.multinomial(bigrams.first, rows, replacement=True, generator=rng)
    table = bigrams.table.clone()
    table[START] = bigrams.first
    for i in range(2, length):
        last = tokens[:, i - 1]
        drawn = torch.multinomial(table[last], 1, generator=rng)[:, 0]
        tokens[:, i] = torch.where(bigrams.triggers[last], tokens[:, i - 2], drawn)
    return tokens


def sink_figures(looks: Sequence[Look], triggers: Tensor) -> dict[str, float]:
    """triggers: [b, n], which queries are triggers. Of the layer whose other queries look most at <s>:

    dormant_sink, active_sink: mean share of a row on <s>, over queries that are no triggers and that are, the second
    on. drain: |value of <s>| / mean |value of the others|. peak: |residual of <s>| / mean of the others', the largest
    of any layer.
    """
    rows = torch.arange(triggers.shape[1]) >= 2
    found = []
    for look in looks:
        first = shares(look.weights)[..., START].mean(1)
        values, residual = look.values.norm(dim=-1).mean(1), look.residual.norm(dim=-1)
        found.append({
            "dormant_sink": float(first[~triggers & rows].mean()),
            "active_sink": float(first[triggers & rows].mean()),
            "drain": float(values[:, START].mean() / values[:, 1:].mean()),
            "peak": float(residual[:, START].mean() / residual[:, 1:].mean()),
        })  # fmt: skip
    chosen = max(found, key=lambda own: own["dormant_sink"])
    return chosen | {"peak": max(own["peak"] for own in found)}


def optimiser_of(name: str, model: torch.nn.Module, rate: float, sgd_rate: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), sgd_rate, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-4)


@register_study
@dataclass(frozen=True)
class BigramBackcopy(Study):
    """Guo et al., Active-Dormant Attention Heads, arXiv:2410.13835.

    Sequences start with <s>; a trigger is followed by the token before it, any other token v by a draw from P(. | v).
    Copying needs attention on triggers only, the rest is known from the token itself: softmax, which must put its
    weight somewhere, learns to put it on <s> and to empty the value there. Measured: attention on <s> by queries that
    are triggers and by others, the norm of its value and of its residual relative to the other tokens'.
    Divergence: random bigrams over a small vocabulary instead of Shakespeare's characters, width 32 instead of 256,
    some hundred steps instead of many thousand. SGD has momentum and a rate of its own (its copy loss tells how far it
    came), Adam's is AdamW. ReLU attention is not normalised here; the
    repository's listing lacks the file that would say.
    """

    name = "bigram-backcopy"
    title = "Sinks in bigram-backcopy"
    claim = (
        "A softmax head that is needed for few tokens attends to the first token, whose value empties, for all others; "
        "ReLU attention does not; with several layers the first token's residual grows with Adam more than with SGD."
    )
    reference = "arXiv:2410.13835"
    simplified = (
        "Random bigrams over 31 tokens instead of Tiny Shakespeare's characters, sequences of 32, width 32 instead of "
        "256, batches of 32 instead of 512, learned positions, and some hundred steps at a high rate instead of many "
        "thousand. ReLU weights are not normalised; their shares of a row are compared."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "dormant_sink": "sink, dormant",
        "active_sink": "sink, active",
        "drain": "value of <s>",
        "peak": "residual of <s>",
        "copy_loss": "copy loss",
        "excess_loss": "excess loss",
    }

    vocab: int = 32
    triggers: int = 3
    length: int = 32
    dim: int = 32
    depths: tuple[int, ...] = (1, 3)
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 0.01
    sgd_rate: float = 0.3

    def points(self) -> list[Point]:
        kinds = ("softmax", "relu")
        words = {depth: f"{depth} layer{'s' * (depth > 1)}" for depth in self.depths}
        own = [(k, d, "adam") for d in self.depths for k in kinds] + [("softmax", max(self.depths), "sgd")]
        return [{"label": f"{k}, {words[d]}{', SGD' * (o == 'sgd')}", "attention": k, "layers": d, "optimiser": o}
                for k, d, o in own]  # fmt: skip

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        bigrams = draw_bigrams(self.vocab, self.triggers, generator(self.name, "table", seed))
        held = draw_sequences(bigrams, 128, self.length, generator(self.name, "eval", seed))
        rng = generator(self.name, "train", seed)
        with seeded(self.name, "weights", seed):
            model = TinyTransformer(self.vocab, self.length, kind=point["attention"], dim=self.dim, heads=1,
                                    layers=point["layers"])  # fmt: skip
        optimiser = optimiser_of(point["optimiser"], model, self.learning_rate, self.sgd_rate)
        curve, marks, stock = [], checkpoints(self.steps, 24), torch.empty(0, self.length, dtype=torch.long)
        for step in range(self.steps + 1):
            if step in marks:
                curve.append({"step": step} | self._figures(model, held, bigrams))
            if len(stock) == 0:
                stock = draw_sequences(bigrams, 25 * self.batch, self.length, rng)
            tokens, stock = stock[: self.batch], stock[self.batch :]
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return {key: value for key, value in curve[-1].items() if key != "step"} | {"curve": curve}

    @torch.no_grad()
    def _figures(self, model: TinyTransformer, held: Tensor, bigrams: Bigrams) -> dict[str, float]:
        looks: list[Look] = []
        inputs, targets = held[:, :-1], held[:, 1:]
        losses = F.cross_entropy(model(inputs, looks).transpose(1, 2), targets, reduction="none")
        copies, chained = bigrams.triggers[inputs], ~bigrams.triggers[inputs] & (inputs != START)
        best = -bigrams.table[inputs[chained], targets[chained]].log().mean()
        return sink_figures(looks, copies) | {
            "copy_loss": float(losses[copies].mean()),
            "excess_loss": float(losses[chained].mean() - best),
        }

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        shallow, deep = min(self.depths), max(self.depths)
        soft, relu = ({"attention": kind, "layers": shallow, "optimiser": "adam"} for kind in ("softmax", "relu"))
        adam, sgd = ({"attention": "softmax", "layers": deep, "optimiser": own} for own in ("adam", "sgd"))
        sink = [(float(cell["dormant_sink"]), float(cell["active_sink"])) for cell in cells
                if all(cell.get(key) == value for key, value in soft.items())]  # fmt: skip
        drain = paired(cells, "drain", relu, soft)
        peak = paired(cells, "peak", adam, sgd)
        numbers = {
            f"{key}_{name}": found
            for key in ("dormant_sink", "active_sink", "drain", "peak", "copy_loss")
            for name, where in (("softmax", soft), ("relu", relu), ("adam", adam), ("sgd", sgd))
            if (found := average(cells, key, **where)) is not None
        }
        lines = (
            said("Share on <s> where nothing is to be copied, against where something is", sink, ".2f"),
            said("Norm of the value of <s> over the others' with ReLU, against softmax", drain, ".2f"),
            said(f"Norm of the residual of <s> over the others' with depth {deep} by Adam, against SGD", peak, ".2f"),
            f"Copy loss by Adam and by SGD: {numbers.get('copy_loss_adam', float('nan')):.2f} and "
            f"{numbers.get('copy_loss_sgd', float('nan')):.2f}.",
        )
        return Verdict(both_ways([always(own) for own in (sink, drain, peak)]), numbers, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        dormant = "Mean share of attention on <s> by queries that are no triggers: nothing is to be copied there."
        active = "The same by triggers, whose head must look at the token before."
        drain = "Norm of the value of <s> over the mean norm of the other values; below 1 it is drained."
        peak = "Norm of the residual of <s> over the others' mean, in the layer where it is largest."
        return [
            *curve_plot(cells, "dormant_sink", "Attention sink, dormant", dormant, "share on <s>"),
            *curve_plot(cells, "active_sink", "Attention sink, active", active, "share on <s>"),
            *curve_plot(cells, "drain", "Value-state drain", drain, "relative norm"),
            *curve_plot(cells, "peak", "Residual-state peak", peak, "relative norm"),
            *curve_plot(cells, "copy_loss", "Loss of copying", "After triggers; 0 is perfect.", "nats"),
            *curve_plot(
                cells, "excess_loss", "Loss of bigrams", "After other tokens, above the best possible.", "nats"
            ),
        ]
