"""Scores read off attention weights: echo and induction on random repeats; sink, local, previous, duplicate on text.

Every score is the share of a query's attention that falls on certain keys, averaged over the queries that have such
keys, so 0 to 1: echo on earlier copies of the query's token, induction on the tokens that followed those, previous on
the token before, duplicate on earlier equal tokens of a text, sink on its first tokens, local on the last `recent`.

Source: echo and induction as in RazorAttention (arXiv 2407.15891: random tokens repeated four times); its published
search sums over all pairs of a [T, T] map and divides by T^2, the same order of heads with another scale.

Legend: b batch, h query heads, n queries, m keys; weights of a block of rows are [b, h, rows, m].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.device import device_of
from manyheads.hosts.probes import Inputs
from manyheads.runs.steps import Tell, silent

REPEATED = ("echo", "induction")
TEXTUAL = ("sink", "local", "previous", "duplicate")
# StreamingLLM's number of sinks (arXiv 2309.17453).
SINKS = 4
# Which keys count for queries i [rows, 1] among keys j [1, m], bool [rows, m]; queries without any are left out.
Rule = Callable[[Tensor, Tensor], Tensor]


def copies(period: int, start: int = 0) -> Rule:
    """Keys i - k period, k >= 1, that are not in front of the first period."""
    return lambda i, j: (i - j >= period) & ((i - j) % period == 0) & (j >= start)


def after_copies(period: int, start: int = 0) -> Rule:
    """Keys one after those."""
    return lambda i, j: (i - j + 1 >= period) & ((i - j + 1) % period == 0) & (j > start)


def first_tokens(sinks: int, recent: int) -> Rule:
    """The first keys, for queries that no longer have them among the last `recent`."""
    return lambda i, j: (j < sinks) & (i >= sinks + recent)


def last_tokens(sinks: int, recent: int) -> Rule:
    """The last `recent` keys, the query's own included, for the same queries."""
    return lambda i, j: (j > i - recent) & (j <= i) & (i >= sinks + recent)


def token_before(i: Tensor, j: Tensor) -> Tensor:
    return j == i - 1


def equal_tokens(ids: Tensor) -> Rule:
    """Earlier keys with the query's own token, ids [n]."""
    return lambda i, j: (j < i) & (ids[i] == ids[j])


def by_layer(rows: Sequence[Tensor]) -> Tensor:
    """[layers, heads, ...] of rows [heads, ...]; ValueError where layers have different numbers of heads."""
    counts = [len(own) for own in rows]
    if len(set(counts)) > 1:
        raise ValueError(
            f"the layers have {', '.join(map(str, counts))} heads, and a profile is a table of layers with the same "
            "number (prune --uniform leaves such): manyheads explain tells of these heads"
        )
    return torch.stack(list(rows))


class Meter:
    """Mean share of attention on a rule's keys, over rows and calls, by layer and head."""

    def __init__(self) -> None:
        self.mass: dict[int, Tensor] = {}
        self.queries: dict[int, int] = {}

    def read(self, layer: int, weights: Tensor, rows: slice, rule: Rule) -> None:
        m, device = weights.shape[-1], weights.device
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        chosen = rule(i, torch.arange(m, device=device)[None])
        mass = torch.einsum("bhnm,nm->h", weights, chosen.to(weights.dtype)).double()
        self.mass[layer] = self.mass.get(layer, 0) + mass
        self.queries[layer] = self.queries.get(layer, 0) + weights.shape[0] * int(chosen.any(1).sum())

    def scores(self) -> Tensor:
        """[layers, heads]"""
        return by_layer([self.mass[layer] / max(1, self.queries[layer]) for layer in sorted(self.mass)])


def measure(model: Any, sequences: Iterable[tuple[Tensor, dict[str, Rule]]]) -> dict[str, Tensor]:
    """One forward pass for every sequence of ids [n]; each rule's score [layers, heads]."""
    from manyheads.hosts.taps import tap

    meters: dict[str, Meter] = {}
    for ids, rules in sequences:

        def read(call: Any, rules: dict[str, Rule] = rules) -> None:
            for rows in call.blocks():
                weights = call.weights(rows=rows)
                for name, rule in rules.items():
                    meters.setdefault(name, Meter()).read(call.layer, weights, rows, rule)

        with torch.no_grad(), tap(model, read, kind="self"):
            model.base_model(input_ids=ids[None].to(device_of(model)), use_cache=False)
    return {name: meter.scores() for name, meter in meters.items()}


def on_repeats(inputs: Inputs, *, length: int, count: int = 4, tell: Tell = silent) -> dict[str, Tensor]:
    """Echo and induction scores on `count` sequences of random tokens repeated four times."""

    def sequences() -> Iterable[tuple[Tensor, dict[str, Rule]]]:
        for number in range(count):
            tell(number, count, "")
            ids, period, start = inputs.repeats(length, number)
            yield ids, {"echo": copies(period, start), "induction": after_copies(period, start)}

    return measure(inputs.loaded.model, sequences())


def on_text(
    inputs: Inputs, *, length: int, recent: int, sinks: int = SINKS, count: int = 4, tell: Tell = silent
) -> dict[str, Tensor]:
    """Sink and local mass, previous and duplicate scores on `count` windows of the text."""
    windows = inputs.windows(length, count, least=2 * (sinks + recent))

    def sequences() -> Iterable[tuple[Tensor, dict[str, Rule]]]:
        for number, ids in enumerate(windows):
            tell(number, len(windows), "")
            yield (
                ids,
                {
                    "sink": first_tokens(sinks, recent),
                    "local": last_tokens(sinks, recent),
                    "previous": token_before,
                    "duplicate": equal_tokens(ids.to(device_of(inputs.loaded.model))),
                },
            )

    return measure(inputs.loaded.model, sequences())
