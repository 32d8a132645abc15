"""How much of what a model says looks at a part of what it was given: mass on spans, and spans' importance.

    mass of rows R on span S    mean over r in R of sum_{j in S} A_rj, [layers, heads]; by chance |S| over what r sees
    importance of segment s     softmax over s of the mean log likelihood of the response after that segment alone
    awareness                   cosine of the segments' masses (mean over layers and heads) and their importance
Strategy-relevant attention, tracked over the turns of a talk: arXiv 2402.10453. Contextual awareness and the gap of two
homologous models' perplexities: GATEAU, arXiv 2410.15633 (S1s-Z/GATEAU), whose cosine is from the paper, as the
released code lacks it; importance there is the softmax of minus the perplexity, as is `scale="perplexity"` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manyheads.explain.detectors.reading import Measure, Rows, read
from manyheads.explain.detectors.subject import Sample, Subject
from manyheads.hosts.device import evaluating
from manyheads.hosts.loading import Loaded

Span = tuple[int, int]


def check_span(span: Sequence[int], n: int, what: str) -> Span:
    if len(span) != 2 or not 0 <= span[0] < span[1] <= n:
        raise ValueError(f"{what} {tuple(span)} is no part of {n} tokens: give (start, stop) with start < stop <= {n}")
    return int(span[0]), int(span[1])


class SpanMass(Measure):
    """Mass of the rows of `response` on each span."""

    def __init__(self, spans: Sequence[Span], response: Span):
        self.spans, self.response, self.rows = spans, response, [Rows() for _ in spans]

    def call(self, call: Any, sample: Sample) -> None:
        self.sums = torch.zeros(len(self.spans), call.heads, dtype=torch.float64)

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        start, stop = (min(max(at, rows.start), rows.stop) - rows.start for at in self.response)
        for place, (first, last) in enumerate(self.spans):
            self.sums[place] += weights[0, :, start:stop, first:last].double().sum((1, 2)).cpu()

    def done(self, call: Any, sample: Sample) -> None:
        for rows, mass in zip(self.rows, self.sums, strict=True):
            rows.add(call.layer, mass / (self.response[1] - self.response[0]))


@dataclass(frozen=True)
class SpanShares:
    """mass [spans, layers, heads]; chance [spans]: what even attention over the tokens that a row sees would give."""

    mass: Tensor
    chance: Tensor

    @property
    def relevance(self) -> Tensor:
        """[spans]: the mean over layers and heads."""
        return self.mass.nanmean((1, 2))


def span_mass(
    model: nn.Module | Loaded, ids: Tensor, spans: Sequence[Sequence[int]], response: Sequence[int]
) -> SpanShares:
    """ids [n] or [1, n]; spans and response: (start, stop) of tokens, the response after what it is to look at."""
    row = ids.reshape(1, -1) if ids.dim() == 1 else ids
    if row.shape[0] != 1:
        raise ValueError(f"spans are places in one input: ids {list(ids.shape)}; give [n] or [1, n]")
    n = row.shape[1]
    own = [check_span(span, n, "span") for span in spans]
    said = check_span(response, n, "response")
    if not own:
        raise ValueError("spans is empty: give (start, stop) pairs")
    subject = Subject(model)
    measure = SpanMass(own, said)
    read(subject, [(Sample({"input_ids": row.to(subject.device)}, "inputs", row[0]), [measure])])
    at = torch.arange(*said, dtype=torch.float64) + 1
    chance = torch.tensor([float(((at - a).clamp(0, b - a) / at).mean()) for a, b in own], dtype=torch.float64)
    return SpanShares(torch.stack([rows.mean() for rows in measure.rows]), chance)


@dataclass(frozen=True)
class Turn:
    """A turn's answer: how many tokens precede it, and the span's relevance and chance there."""

    before: int
    relevance: float
    chance: float
    mass: Tensor


def relevance_over_turns(
    model: nn.Module | Loaded, ids: Tensor, span: Sequence[int], responses: Sequence[Sequence[int]]
) -> list[Turn]:
    """How much every response of a talk looks at one span, such as the instruction that it began with; each response
    is read with what precedes it alone."""
    if not responses:
        raise ValueError("responses is empty: give the (start, stop) of every turn's answer")
    found = []
    for response in responses:
        start, stop = check_span(response, ids.reshape(-1).shape[0], "response")
        if start < span[1]:
            raise ValueError(f"response {(start, stop)} begins before the span {tuple(span)} ends: it cannot see it")
        shares = span_mass(model, ids.reshape(-1)[:stop], [span], (start, stop))
        found.append(Turn(start, float(shares.relevance[0]), float(shares.chance[0]), shares.mass[0]))
    return found


@torch.no_grad()
def response_loss(model: nn.Module | Loaded, before: Tensor, response: Tensor) -> float:
    """Mean nats per token of the response [n] after `before` [m]; its first token counts where something precedes."""
    subject = Subject(model)
    row = torch.cat([before, response]).to(subject.device)
    if len(response) < 1 or len(row) < 2:
        raise ValueError(f"a response of {len(response)} tokens after {len(before)}: want a token that can be foretold")
    with evaluating(subject.model):
        logits = subject.whole({"input_ids": row[None]}).logits[0]
    first = max(1, len(before))
    return float(cross_entropy(logits[first - 1 : -1].double(), row[first:]))


@dataclass(frozen=True)
class Awareness:
    """attention, importance [segments], each summing to one; score: their cosine, 1 where attention is as the segments
    are worth."""

    attention: Tensor
    importance: Tensor
    score: float


def contextual_awareness(
    model: nn.Module | Loaded,
    segments: Sequence[Tensor],
    question: Tensor,
    response: Tensor,
    *,
    scale: Literal["perplexity", "loss"] = "perplexity",
) -> Awareness:
    """segments: ids [n] each, of the context; question: what stands between it and the response. scale: whether the
    importance is the softmax of minus perplexities, as published, or of minus losses, which does not saturate."""
    if len(segments) < 2 or any(len(own) == 0 for own in segments):
        raise ValueError(f"{len(segments)} segments: want two or more, none of them empty")
    if scale not in ("perplexity", "loss"):
        raise ValueError(f"scale={scale!r}; want 'perplexity' or 'loss'")
    losses = torch.tensor([response_loss(model, torch.cat([own, question]), response) for own in segments])
    importance = (-(losses.exp() if scale == "perplexity" else losses)).double().softmax(0)
    ends = torch.tensor([len(own) for own in segments]).cumsum(0).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    whole = torch.cat([*segments, question, response])
    mass = span_mass(model, whole, spans, (len(whole) - len(response), len(whole))).relevance.double()
    attention = mass / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)
    return Awareness(attention, importance, float(torch.cosine_similarity(attention, importance, 0)))


def homologous_gap(
    short: nn.Module | Loaded, long: nn.Module | Loaded, samples: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """[samples]: perplexity of each response by the model of short contexts less that by its homologue of long ones,
    min-max normalised and softmaxed over the samples, as published. samples: (context, response) ids. A sample that
    only the long one foretells needs its context."""
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples: the gap is one among others: give two or more")
    gaps = [response_loss(short, *own) for own in samples], [response_loss(long, *own) for own in samples]
    gap = torch.tensor(gaps[0], dtype=torch.float64).exp() - torch.tensor(gaps[1], dtype=torch.float64).exp()
    wide = gap.max() - gap.min()
    return ((gap - gap.min()) / wide if float(wide) > 0 else torch.zeros_like(gap)).softmax(0)


def influence_scores(gap: Tensor, awareness: Sequence[float], alpha: float = 0.8) -> Tensor:
    """alpha gap + (1 - alpha) awareness, [samples]; alpha 0.8 as published. By sum one each, so that neither rules."""
    if not 0 <= alpha <= 1 or len(awareness) != len(gap):
        raise ValueError(f"alpha={alpha}, {len(gap)} gaps and {len(awareness)} scores: want 0 to 1, as many of both")
    own = torch.tensor(list(awareness), dtype=torch.float64).softmax(0)
    return alpha * gap + (1 - alpha) * own
