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

from manyheads.explain.studies.bigram_backcopy import draw_bigrams, draw_sequences, optimiser_of
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


DATA = ("language with <s>", "language", "text")


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
    Varied on the first data: SGD in place of AdamW, the loss of the second half of a window alone, and a key bias k*
    per head whose value is zero, which the paper finds to take the sink's place.
    Measured: the metric, mean alpha_1, and the validation loss over training.
    Divergence: two layers of four heads, width 32, windows of 32 and some hundred steps, instead of 60M parameters on
    5 * 10^9 tokens; beside text (bytes of Python's standard library, windows that start anywhere) the language of
    bigram-backcopy, whose sequences start with <s> or with any token. AdamW without the paper's weight decay of 0.1.
    """

    name = "sink-emergence"
    title = "When attention sinks emerge"
    claim = (
        "Attention to the first token, whatever it is, emerges while a softmax language model is trained, and does not "
        "with sigmoid attention that is not normalised, and less where a learned key without a value takes it up; SGD "
        "in place of Adam makes sinks rarer."
    )
    reference = "arXiv:2410.10781"
    simplified = (
        "A model of two layers with four heads each, width 32 and windows of 32 tokens, some hundred steps at a high "
        "rate; the paper's have 60 million parameters and 5 billion tokens. Beside bytes of Python's standard library "
        "it reads a synthetic language of bigrams with copies, with and without a fixed first token. Figures on text "
        "depend on the installed Python's sources."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "sinks": "sink heads",
        "first": "share on first",
        "applied": "weight on first",
        "bits": "bits per token",
    }

    vocab: int = 32
    length: int = 32
    dim: int = 32
    heads: int = 4
    layers: int = 2
    steps: int = 700
    batch: int = 32
    learning_rate: float = 0.01
    epsilon: float = 0.3
    sgd_rate: float = 0.3

    def points(self) -> list[Point]:
        usual = {"optimiser": "adam", "loss": "next token"}
        kinds = [
            {"label": f"{kind}, {data}", "attention": kind, "data": data, **usual}
            for data in DATA
            for kind in ("softmax", "sigmoid")
        ]
        first = {"attention": "softmax", "data": DATA[0], **usual}
        varied = [
            {"label": "key bias", **first, "attention": "key-bias"},
            {"label": "SGD", **first, "optimiser": "sgd"},
            {"label": "loss of the second half", **first, "loss": "second half"},
        ]
        return [*kinds, *varied]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        vocab, held, batches = self._text(seed) if point["data"] == "text" else self._language(seed, point["data"])
        with seeded(self.name, "weights", seed):
            model = TinyTransformer(vocab, self.length, kind=point["attention"], dim=self.dim, heads=self.heads,
                                    layers=self.layers)  # fmt: skip
        optimiser = optimiser_of(point["optimiser"], model, self.learning_rate, self.sgd_rate)
        told = 0 if point["loss"] == "next token" else self.length // 2
        warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, total_iters=max(1, self.steps // 10))
        curve, marks = [], checkpoints(self.steps, 20)
        for step in range(self.steps + 1):
            if step in marks:
                curve.append({"step": step} | self._figures(model, held))
            tokens = next(batches)
            optimiser.zero_grad()
            found = model(tokens[:, :-1])[:, told:]
            F.cross_entropy(found.flatten(0, 1), tokens[:, told + 1 :].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            warm.step()
        return {key: value for key, value in curve[-1].items() if key != "step"} | {"curve": curve}

    def _language(self, seed: int, data: str) -> tuple[int, Tensor, Iterator[Tensor]]:
        """Vocabulary, held-out sequences and batches [b, length + 1] of bigrams with copies, with their <s> or not."""
        cut = 0 if data == "language with <s>" else 1
        bigrams = draw_bigrams(self.vocab, 3, generator(self.name, "table", seed))

        def draw(rows: int, rng: Generator) -> Tensor:
            return draw_sequences(bigrams, rows, self.length + 1 + cut, rng)[:, cut:]

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
        first, applied = (
            torch.stack([received(own)[..., 0] for own in some]).mean()
            for some in (weights, [look.weights for look in looks])
        )
        sinks = sink_share(weights, self.epsilon)
        return {"sinks": sinks, "first": float(first), "applied": float(applied), "bits": float(loss) / math.log(2)}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        numbers = {
            f"{key}, {point['label']}": found
            for point in self.points()
            for key in ("sinks", "first", "applied", "bits")
            if (found := average(cells, key, **{k: v for k, v in point.items() if k != "label"})) is not None
        }
        if len(numbers) < 4 * len(self.points()):
            return Verdict(None, numbers, ("Not every condition was measured.",))
        usual = {"data": DATA[0], "loss": "next token"}
        soft = usual | {"attention": "softmax", "optimiser": "adam"}
        start = [(float(cell["sinks"]), float(cell["curve"][0]["sinks"])) for cell in cells
                 if cell.get("curve") and all(cell.get(key) == value for key, value in soft.items())]  # fmt: skip
        others = [paired(cells, "sinks", soft, soft | change) for change in
                  ({"attention": "sigmoid"}, {"attention": "key-bias"}, {"optimiser": "sgd"})]  # fmt: skip
        words = ("sigmoid attention", "a key bias", "SGD")
        lines = [said(f"Sink heads after training on {DATA[0]}, against before", start)]
        lines += [said(f"And against {word}", pairs) for word, pairs in zip(words, others, strict=True)]
        lines += [
            f"{point['label']}: {numbers['sinks, ' + point['label']]:.1%} of heads at "
            f"{numbers['bits, ' + point['label']]:.2f} bits per token."
            for point in self.points()
        ]
        return Verdict(both_ways([always(own) for own in (start, *others)]), numbers, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        sinks = (
            f"Share of heads whose first key gets more than {self.epsilon:g} of the attention, over held-out sequences."
        )
        first = "Mean over heads of what the first key gets; for sigmoid of its share of a row."
        weight = "As it is applied: for sigmoid without making a row's weights sum to 1."
        return [
            *curve_plot(cells, "sinks", "Sink heads", sinks, "share of heads"),
            *curve_plot(cells, "first", "Attention on the first token", first, "share"),
            *curve_plot(cells, "applied", "Weight on the first token", weight, "weight"),
            *curve_plot(cells, "bits", "Loss", "On held-out sequences.", "bits per token"),
        ]
