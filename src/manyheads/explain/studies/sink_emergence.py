"""When sinks emerge: a small language model's heads turn to the first token with softmax, not with sigmoid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from manyheads.explain.studies.bigram_backcopy import draw_bigrams, draw_sequences
from manyheads.explain.studies.drawing import curve_plot
from manyheads.explain.studies.study import Cell, Point, Study, Verdict, average, checkpoints, register_study, seeded
from manyheads.explain.studies.tiny import Look, TinyTransformer, shares
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.compare.charts import Plot


def received(weights: Tensor) -> Tensor:
    """weights [b, h, n, n], causal -> [b, h, n]: alpha_k = sum_i a_ik / (n - k), the mean attention that key k gets
    from the queries that see it."""
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
    columns: ClassVar[Mapping[str, str]] = {"sinks": "sink heads", "first": "mean on first", "bits": "bits per token"}
    seeds = 1

    vocab: int = 32
    length: int = 32
    dim: int = 32
    heads: int = 4
    layers: int = 2
    steps: int = 700
    batch: int = 32
    learning_rate: float = 0.01
    epsilon: float = 0.3

    def points(self) -> list[Point]:
        return [
            {"label": f"{kind}, {data}", "attention": kind, "data": data}
            for data in ("language", "text")
            for kind in ("softmax", "sigmoid")
        ]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        make = self._text if point["data"] == "text" else self._language
        vocab, held, batches = make(seed)
        with seeded(self.name, "weights", seed):
            model = TinyTransformer(vocab, self.length, kind=point["attention"], dim=self.dim, heads=self.heads,
                                    layers=self.layers)  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, total_iters=max(1, self.steps // 10))
        curve, marks = [], checkpoints(self.steps, 20)
        for step in range(self.steps + 1):
            if step in marks:
                curve.append({"step": step} | self._figures(model, held))
            tokens = next(batches)
            optimiser.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            warm.step()
        return {key: value for key, value in curve[-1].items() if key != "step"} | {"curve": curve}

    def _language(self, seed: int) -> tuple[int, Tensor, Iterator[Tensor]]:
        """Vocabulary, held-out sequences and batches [b, length + 1] of bigrams with copies, without their <s>."""
        bigrams = draw_bigrams(self.vocab, 3, generator(self.name, "table", seed))

        def draw(rows: int, rng: Generator) -> Tensor:
            return draw_sequences(bigrams, rows, self.length + 2, rng)[:, 1:]

        rng = generator(self.name, "train", seed)
        many = (part for _ in repeat(None) for part in draw(25 * self.batch, rng).split(self.batch))
        return self.vocab, draw(128, generator(self.name, "eval", seed)), many

    def _text(self, seed: int) -> tuple[int, Tensor, Iterator[Tensor]]:
        from manyheads.tasks import create_task

        text = create_task("text", n=self.length, max_bytes=1_000_000, eval_windows=128)

        def whole(batch: Any) -> Tensor:
            return torch.cat([batch.inputs["input_ids"], batch.targets[:, -1:]], 1)

        held = whole(next(iter(text.eval_batches(128))))
        return 256, held, (whole(batch) for batch in text.train_batches(self.batch, seed))

    @torch.no_grad()
    def _figures(self, model: TinyTransformer, held: Tensor) -> dict[str, float]:
        looks: list[Look] = []
        loss = F.cross_entropy(model(held[:, :-1], looks).flatten(0, 1), held[:, 1:].flatten())
        weights = [shares(look.weights) for look in looks]
        first = torch.stack([received(own)[..., 0] for own in weights]).mean()
        sinks = sink_share(weights, self.epsilon)
        return {"sinks": sinks, "first": float(first), "bits": float(loss) / math.log(2)}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        numbers = {
            f"{key}_{kind}_{data}": found
            for key in ("sinks", "first", "bits")
            for kind in ("softmax", "sigmoid")
            for data in ("language", "text")
            if (found := average(cells, key, attention=kind, data=data)) is not None
        }
        if len(numbers) < 12:
            return Verdict(None, numbers, ("Not every condition was measured.",))
        start = max((row["sinks"] for cell in cells for row in cell.get("curve", ())[:1]), default=0.0)
        lines = tuple(
            f"{title}: {numbers[f'sinks_softmax_{data}']:.1%} of the heads are sinks with softmax, "
            f"{numbers[f'sinks_sigmoid_{data}']:.1%} with sigmoid, {start:.1%} before training, at "
            f"{numbers[f'bits_softmax_{data}']:.2f} and {numbers[f'bits_sigmoid_{data}']:.2f} bits per token."
            for data, title in (("language", "Synthetic language"), ("text", "Text"))
        )
        sinks = numbers["sinks_softmax_language"]
        return Verdict(sinks > start + 0.05 and sinks > 2 * numbers["sinks_sigmoid_language"], numbers, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        sinks = (
            f"Share of heads whose first key gets more than {self.epsilon:g} of the attention, over held-out sequences."
        )
        first = "Mean over heads of what the first key gets; for sigmoid of its share of a row."
        return [
            *curve_plot(cells, "sinks", "Sink heads", sinks, "share of heads"),
            *curve_plot(cells, "first", "Attention on the first token", first, "share"),
            *curve_plot(cells, "bits", "Loss", "On held-out sequences.", "bits per token"),
        ]
