"""DropKey: in training, every query of every head leaves out keys at random before the softmax, less so with depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import only_stack
from manyheads.hosts.taps import tap


@contextmanager
def drop_key(
    model: nn.Module,
    first: float = 0.2,
    last: float = 0.0,
    *,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
) -> Iterator[dict[int, float]]:
    """While open, self attention in training mode is softmax(S + D) V, D_ij = -inf with probability r_l, else 0, drawn
    anew for every entry, head and pass;

        r_l = first + (last - first) l / (L - 1),  l = 0 .. L - 1 the chosen layers in order

    (r_0 = first of a single layer). Gives the ratios by layer. The softmax spreads the weight over what is left:
    nothing is scaled up, neither here nor in eval mode, where nothing is dropped. first = last: the same everywhere.

    Attention dropout of the model's own stays. A query that would lose all keys that it sees keeps them all; released
    code adds a constant to every score, so that such a query attends evenly, padding included. Backward of gradient
    checkpointing (the model's own) drops what the forward pass dropped. ValueError: for a ratio outside [0, 1), a model
    of several stacks when none is said, and mechanisms whose weights are no softmax of scores, by name.
    Source: Li et al., DropKey for Vision Transformer, arXiv:2208.02646. Thapa et al., MoRE, arXiv:2410.16239, calls it
    linear attention drop, with this schedule and these ratios; what its released code trains with is 0.3 everywhere,
    since the schedule is written where nothing reads it: first=0.3, last=0.3.
    """
    for name, value in (("first", first), ("last", last)):
        if not 0 <= value < 1:
            raise ValueError(f"drop_key: {name}={value}; want the share of keys to drop, at least 0 and below 1")
    ratios: dict[int, float] = {}

    def reader(call: Any) -> Tensor | None:
        own = opened(call, "drop_key")
        ratio = ratios[own.layer]
        if not own.site.module.training or ratio == 0:
            return None
        # Kept with the call, so that a layer that is computed anew draws the same keys.
        if "seed" not in own.memo:
            own.memo["seed"] = int(torch.randint(2**62, ()))
        draws = torch.Generator(own.query.device).manual_seed(own.memo["seed"])

        def change(scores: Tensor, rows: slice) -> Tensor:
            gone = torch.rand(scores.shape, generator=draws, device=scores.device) < ratio
            seen = own.visible(rows)
            left = ~gone if seen is None else ~gone & seen
            return scores.masked_fill(gone & left.any(-1, keepdim=True), -torch.inf)

        return own.rescored(change)

    with tap(model, reader, layers=layers, stack=only_stack(model, stack), kind="self") as sites:
        depth = max(len(sites) - 1, 1)
        ratios.update(
            {site.layer: (first * (depth - place) + last * place) / depth for place, site in enumerate(sites)}
        )
        yield ratios
