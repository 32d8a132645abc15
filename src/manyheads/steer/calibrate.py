"""ACT: attention sinks other than the first are turned down, and what they held goes to the other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import AttentionCall, record
from manyheads.steer.common import Heads, changed, check_share, parse_heads
from manyheads.steer.method import Prompt, steering


def real_keys(call: AttentionCall) -> Tensor:
    """[b or 1, 1 or h, m] bool: keys that some query may see; padding is seen by none."""
    if call.mask is None:
        return torch.ones(1, 1, call.key.shape[2], dtype=torch.bool, device=call.key.device)
    seen = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
    return seen.any(-2)


def column_means(call: AttentionCall, heads: list[int] | None) -> Tensor:
    """[b, heads, m]: the attention that a key gets, on average over the real queries that come no earlier than it."""
    n, m = call.query.shape[2], call.key.shape[2]
    queries = real_keys(call)[:, :1, m - n :].float()
    parts = [
        (call.weights(heads, rows) * queries[:, :, rows, None]).sum(2, keepdim=True) for rows in call.blocks(heads)
    ]
    later = queries.flip(-1).cumsum(-1).flip(-1)
    viewers = torch.cat([later[..., :1].expand(-1, -1, m - n), later], -1)
    return torch.cat(parts, 2).sum(2) / viewers.clamp_min(1)


def sinks_of(call: AttentionCall, heads: list[int] | None, alpha: float) -> Tensor:
    """[b, heads, m] bool: keys whose mean attention exceeds alpha / (real keys), but for a head's first such key."""
    real = real_keys(call)[:, :1]
    above = (column_means(call, heads) > alpha / real.sum(-1, keepdim=True)) & real
    return above & (above.long().cumsum(-1) > 1)


@contextmanager
def calibrate(
    model: nn.Module, beta: float, *, alpha: float = 5.0, heads: Heads | None = None, stack: str | None = None
) -> Iterator[None]:
    """Claim: sinks in the middle of a text take attention that belongs to its words; turning them down mends answers.

    sinks S_h = {j : mean_i A_ij > alpha / m} without the first of them, padding not counted; A'_ij = beta A_ij for j in
    S_h, the freed (1 - beta) sum_S A_ij shared among the other keys in proportion to A_ij. Sinks are found on the
    prompt's full matrix (in blocks of rows) and remembered while decoding. beta 1 changes nothing. stack: whose layers;
    the one that reads text.
    Source: arXiv 2406.15765, GATECH-EIC/ACT `atten_process_eval`; there sinks come from one row of the batch alone and
    row 0 is left out; here each row has its own. Heads are chosen on a calibration set: `choose_heads`.
    """
    check_share("calibrate: beta", beta)
    known: dict[int, Tensor] = {}

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        if beta == 1:
            return None
        n, m = call.query.shape[2], call.key.shape[2]
        if n > 1 or m == 1 or call.layer not in known:
            known[call.layer] = sinks_of(call, own, alpha)
        sinks = nn.functional.pad(known[call.layer], (0, m - known[call.layer].shape[-1])).unsqueeze(2)
        if not bool(sinks.any()):
            return None

        def edit(weights: Tensor, rows: slice) -> Tensor:
            others = weights.masked_fill(sinks, 0)
            rest = others.sum(-1, keepdim=True)
            freed = (1 - beta) * (weights.sum(-1, keepdim=True) - rest)
            # A row that sees nothing but sinks keeps what it has.
            moved = torch.where(sinks, beta * weights, others * (1 + freed / rest.clamp_min(1e-12)))
            return torch.where(rest > 1e-6, moved, weights)

        return call.mix(edit, own)

    with changed(model, heads, change, stack, of_text=True):
        yield


@torch.no_grad()
def choose_heads(
    model: Any,
    examples: Sequence[tuple[Mapping[str, Any], int]],
    *,
    beta: float = 0.4,
    alpha: float = 5.0,
    layers: Sequence[int] | None = None,
    count: int | None = None,
) -> list[tuple[int, int]]:
    """The choice of heads offline: each head alone is calibrated, and those on which examples (inputs of one row, and
    the token that should come next) become more probable are kept, the best first, `count` at most. layers: the paper's
    are all but the first two and the last. One run per head and example. A head without a sink changes nothing and is
    never chosen. ValueError where no head helps.

    Source: arXiv 2406.15765, where heads that raise accuracy on a calibration set are listed per model; the mean log
    probability of the right token stands for accuracy here, which a few examples cannot tell apart."""
    if not examples:
        raise ValueError("choose_heads: give examples, each the inputs of one row and the token that should come next")
    every = sorted(site.layer for site in choose(model, None, text_stack(model), "self"))
    wanted = (every[2:-1] or every) if layers is None else list(layers)

    def worth() -> float:
        total = 0.0
        for inputs, token in examples:
            logits = model(**inputs, use_cache=False).logits[0, -1].float()
            total += float(logits.log_softmax(-1)[token])
        return total / len(examples)

    base, gains = worth(), {}
    with record(model, layers=wanted, stack=text_stack(model), kind="self") as calls:
        model(**examples[0][0], use_cache=False)
    for layer, head in [(call.layer, head) for call in calls for head in range(call.heads)]:
        with calibrate(model, beta, alpha=alpha, heads=[(layer, head)]):
            gains[layer, head] = worth() - base
    found = sorted((place for place in gains if gains[place] > 0), key=lambda place: -gains[place])[:count]
    if not found:
        raise ValueError("choose_heads: calibrating no single head made the right tokens more probable; leave it")
    return found


@steering(
    "calibrate",
    title="attention sinks in the middle turned down for the words around them",
    source="arXiv 2406.15765",
    kinds=("language", "vision-language"),
    neutral={"beta": 1.0},
    strength="beta",
    reach=(0.0, 1.0),
)
def _open(
    model: nn.Module, prompt: Prompt, *, beta: float = 0.4, alpha: float = 5.0, heads: str | None = None
) -> AbstractContextManager[None]:
    return calibrate(model, beta, alpha=alpha, heads=parse_heads(heads))
