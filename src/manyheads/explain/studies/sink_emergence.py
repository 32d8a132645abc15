"""When sinks emerge: a small language model's heads turn to the first token with softmax, not with sigmoid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.explain.studies.drawing import curve_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, average, checkpoints, register_study, seeded
from manyheads.explain.studies.tiny import Look, TinyTransformer, shares

if TYPE_CHECKING:
    from manyheads.compare.charts import Plot


def received(weights: Tensor) -> Tensor:
    """weights [b, h, n, n], causal -> [b, h, n]: alpha_k = sum_i a_ik / (n - k), the mean attention that key k gets from
    the queries that see it."""
    n = weights.shape[-1]
    return weights.sum(-2) / torch.arange(n, 0, -1, dtype=weights.dtype, device=weights.device)


def sink_share(weights: Sequence[Tensor], epsilon: float) -> float:
    """Sink_1 of the paper: of all layers' heads on all sequences, the share whose first key gets more than epsilon."""
    first = torch.stack([received(own)[..., 0] for own in weights])
    return float((first > epsilon).float().mean())


@register_study
@dataclass(frozen=True)
class SinkEmergence(Study):
    """Gu et al., When Attention Sink Emerges in Language Models: An Empirical View, arXiv:2410.10781.

    Sink metric: the share of heads (l, h) with alpha_1 > epsilon, where alpha_k = 1 / (n - k + 1) sum_{i >= k} a_ik and
    epsilon = 0.3. Claim: it rises while a language model is trained, later than the loss falls and more with a larger
    learning rate; with sigmoid attention, not normalised, it stays at zero. For sigmoid a is a weight's share of its
    row, as in the released code.
    Measured: the metric, mean alpha_1, and the validation loss over training.
    Divergence: two layers of four heads, width 64, on bytes of Python's own standard library in windows of 64 that
    start anywhere, instead of 60M parameters on 5 * 10^9 tokens. A model this small has little use for a sink.
    """

    name = "sink-emergence"
    title = "When attention sinks emerge"
    claim = (
        "Attention to the first token, whatever it is, emerges while a softmax language model is trained, and does not "
        "with sigmoid attention that is not normalised."
    )
    reference = "arXiv:2410.10781"
    simplified = (
        "A model of two layers with four heads each and width 64 on bytes of Python's standard library, windows of 64 "
        "bytes, some hundred steps at a high learning rate; the paper's have 60 million parameters and 5 billion tokens. "
        "Figures depend on the installed Python's sources."
    )
    columns = {"sinks": "sink heads", "first": "mean on first", "bits": "bits per byte"}
    seeds = 1

    length: int = 64
    dim: int = 64
    heads: int = 4
    layers: int = 2
    steps: int = 600
    batch: int = 16
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    epsilon: float = 0.3

    def points(self) -> list[Point]:
        return [
            {"label": f"{kind}, rate {rate:g}", "attention": kind, "learning_rate": rate}
            for rate in self.learning_rates
            for kind in ("softmax", "sigmoid")
        ]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        from manyheads.tasks import create_task

        text = create_task("text", n=self.length, max_bytes=1_000_000, eval_windows=64)
        held = next(iter(text.eval_batches(64)))
        with seeded(self.name, "weights", seed):
            model = TinyTransformer(256, self.length, kind=point["attention"], dim=self.dim, heads=self.heads,
                                    layers=self.layers, rotary=True)  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), point["learning_rate"], betas=(0.9, 0.95), weight_decay=0.1)
        warm = max(1, self.steps // 10)
        curve, marks = [], checkpoints(self.steps, 20)
        batches = text.train_batches(self.batch, seed)
        for step in range(self.steps + 1):
            if step in marks:
                curve.append({"step": step} | self._figures(model, held.inputs["input_ids"], held.targets))
            batch = next(batches)
            logits = model(batch.inputs["input_ids"])
            for group in optimiser.param_groups:
                group["lr"] = point["learning_rate"] * min(1.0, (step + 1) / warm)
            optimiser.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        return {key: value for key, value in curve[-1].items() if key != "step"} | {"curve": curve}

    @torch.no_grad()
    def _figures(self, model: TinyTransformer, inputs: Tensor, targets: Tensor) -> dict[str, float]:
        looks: list[Look] = []
        loss = F.cross_entropy(model(inputs, looks).flatten(0, 1), targets.flatten())
        weights = [shares(look.weights) for look in looks]
        first = torch.stack([received(own)[..., 0] for own in weights]).mean()
        sinks = sink_share(weights, self.epsilon)
        return {"sinks": sinks, "first": float(first), "bits": float(loss) / 0.6931471805599453}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        numbers = {
            f"{key}_{kind}_{rate:g}": found
            for key in ("sinks", "first", "bits")
            for kind in ("softmax", "sigmoid")
            for rate in self.learning_rates
            if (found := average(cells, key, attention=kind, learning_rate=rate)) is not None
        }
        if len(numbers) < 6 * len(self.learning_rates):
            return Verdict(None, numbers, ("Not every condition was measured.",))
        rate = max(self.learning_rates, key=lambda own: numbers[f"sinks_softmax_{own:g}"])
        with_softmax = numbers[f"sinks_softmax_{rate:g}"]
        most = max(numbers[f"sinks_sigmoid_{own:g}"] for own in self.learning_rates)
        start = max((row["sinks"] for cell in cells for row in cell.get("curve", ())[:1]), default=0.0)
        lines = (
            f"Softmax: {with_softmax:.1%} of the heads are sinks after training at a rate of {rate:g}, {start:.1%} "
            "before.",
            f"Sigmoid: at most {most:.1%}.",
            f"Bits per byte at that rate: {numbers[f'bits_softmax_{rate:g}']:.2f} with softmax, "
            f"{numbers[f'bits_sigmoid_{rate:g}']:.2f} with sigmoid.",
        )
        return Verdict(with_softmax > start + 0.02 and with_softmax > 2 * most, numbers, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        sinks = f"Share of heads whose first key gets more than {self.epsilon:g} of the attention, over held-out text."
        first = "Mean over heads of what the first key gets; for sigmoid of its share of a row."
        return [
            *curve_plot(cells, "sinks", "Sink heads", sinks, "share of heads"),
            *curve_plot(cells, "first", "Attention on the first token", first, "share"),
            *curve_plot(cells, "bits", "Loss", "On held-out text.", "bits per byte"),
        ]
