"""What massive values of queries and keys are worth: taken out, and rounded to few bits, against other channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.explain.detectors.massive import massive_values
from manyheads.explain.studies.drawing import strip_plot
from manyheads.explain.studies.models import ModelStudy, hidden_keys, needle_recall
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, paired, register_study, said
from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import tap
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

CHANGES = {
    "none": "as they are",
    "massive": "massive channels taken out",
    "others": "other channels taken out",
    "rounded": "all channels rounded together",
    "apart": "rounded, massive channels apart",
}


def without(x: Tensor, chosen: Tensor) -> Tensor:
    """x [b, h, n, d] with the channels where chosen [h, d] is True at the mean of the token's other channels."""
    kept = (~chosen).to(x.dtype)[None, :, None]
    middle = (x * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
    return torch.where(chosen[None, :, None], middle, x)


def rounded(x: Tensor, bits: int, apart: Tensor | None = None) -> Tensor:
    """Every token's head vector in 2^bits - 1 even steps between -max |x| and max |x|. apart [h, d]: channels that
    stay as they are and do not count for the maximum."""
    alone = torch.zeros(x.shape[1], x.shape[-1], dtype=torch.bool) if apart is None else apart
    alone = alone.to(x.device)[None, :, None]
    top = 2 ** (bits - 1) - 1
    step = x.masked_fill(alone, 0).abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / top
    return torch.where(alone, x, (x / step).round().clamp(-top, top) * step)


def greatest(norms: Tensor, count: int) -> Tensor:
    """[h, d]: True at the `count` channels of greatest norm of every head."""
    return torch.zeros_like(norms, dtype=torch.bool).scatter(-1, norms.topk(count).indices, True)


def others(norms: Tensor, count: int, seed: int) -> Tensor:
    """As many of each head's other channels by chance."""
    draw = torch.rand(norms.shape, generator=generator("massive-cost", seed))
    return greatest(draw.masked_fill(greatest(norms, count), -1), count)


@contextmanager
def queries_and_keys(model: Any, change: Any) -> Iterator[None]:
    """change(name, layer, x) -> x for the queries and the keys of every self-attention layer, after rotation."""

    def reader(call: Any) -> Tensor:
        own = opened(call, "massive-cost")
        query, key = change("query", own.layer, own.query), change("key", own.layer, own.key)
        new = AttentionCall(own.site, query, key, own.value, own.mask, own.causal, own.scoring)
        new.output = own.output
        return new.mix(lambda weights, _: weights)

    with tap(model, reader, kind="self"):
        yield


@lru_cache(maxsize=1)
def _norms(loaded: Loaded, length: int, seed: int) -> dict[str, Tensor]:
    """[layers, heads or groups, d] each, and how many times the mean the greatest is."""
    groups = getattr(loaded.config, "num_key_value_heads", None) or loaded.config.num_attention_heads
    found = {}
    for name in ("query", "key"):
        channels = massive_values(loaded, name, length=length, count=1, seed=seed)
        each = channels.norms.shape[1] // groups if name == "key" else 1
        found[name] = channels.norms[:, ::each]
    return found


@register_study
@dataclass(frozen=True)
class MassiveCost(ModelStudy):
    """Jin et al., Massive Values in Self-Attention Modules are the Key to Contextual Knowledge Understanding,
    arXiv:2502.01563.

    The channels of each head's queries and keys with the greatest norm over a text, a `share` of them, are set to the
    mean of the token's other channels; so are as many others by chance. Rounding: every token's vector to `bits` bits
    with one scale, and with the massive channels kept apart. Measured: hidden keys said, nats per token on text.
    Divergence: a share of channels per head instead of those above five times the mean, which the smallest heads
    cannot have; the paper's question of facts from parameters is text here; queries and keys are changed at every
    token, after rotation. What the mean is taken over is this file's reading.
    """

    name = "massive-cost"
    title = "Massive values taken out and rounded"
    claim = (
        "Without the few massive channels of queries and keys what stands in the context is lost, without as many "
        "others it is not; and rounding to few bits costs less where massive channels are kept apart."
    )
    reference = "arXiv:2502.01563"
    simplified = (
        "Hidden keys of five digits in a few hundred tokens and a small model; a share of every head's channels in "
        "place of a threshold; text in place of questions of facts."
    )
    columns: ClassVar[Mapping[str, str]] = {
        "recall": "keys said",
        "nats": "nats per token",
        "ratio": "greatest to mean",
    }

    model: str = ""
    length: int = 192
    count: int = 3
    share: float = 0.0625
    bits: int = 4

    def points(self) -> list[Point]:
        return [{"label": label, "change": name} for name, label in CHANGES.items()]

    @torch.no_grad()
    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        loaded, change = self.loaded, point["change"]
        norms = _norms(loaded, self.length, seed)
        count = max(1, round(self.share * norms["query"].shape[-1]))

        def changed(name: str, layer: int, x: Tensor) -> Tensor:
            own = norms[name][layer]
            if change in ("massive", "others"):
                chosen = greatest(own, count) if change == "massive" else others(own, count, seed)
                return without(x, chosen.to(x.device))
            return rounded(x, self.bits, greatest(own, count) if change == "apart" else None)

        def same(name: str, layer: int, x: Tensor) -> Tensor:
            return x

        needles = hidden_keys(loaded, self.length, self.count, seed, self.name)
        with queries_and_keys(loaded.model, same if change == "none" else changed):
            recall, nats = needle_recall(loaded, needles), _nats(loaded, needles[0].ids)
        ratio = float((norms["key"].amax(-1) / norms["key"].mean(-1)).mean())
        return {"recall": recall, "nats": nats, "ratio": ratio}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        none, massive, other, together, apart = ({"change": name} for name in CHANGES)
        lost, beyond = (paired(cells, "recall", more, massive) for more in (none, other))
        cost = paired(cells, "nats", together, apart)
        lines = (
            said("Keys said as they are, against massive channels taken out", lost),
            said("Keys said with other channels taken out, against massive ones", beyond),
            said(f"Nats per token at {self.bits} bits, all together against massive channels apart", cost),
        )
        return Verdict(both_ways([always(own) for own in (lost, beyond, cost)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        return [
            *strip_plot(cells, "recall", "Keys said", "Of the hidden keys' tokens; 1 is all of them.", "share"),
            *strip_plot(cells, "nats", "Loss on text", "On a text with a hidden key.", "nats per token"),
        ]


def _nats(loaded: Loaded, ids: Tensor) -> float:
    logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return float(F.cross_entropy(logits.double(), ids[1:]))
