"""CUR: keys and values of high leverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import TextOrder, one_text, whole_number, wide

OF = ("key", "value", "mean", "product")


@dataclass(kw_only=True)
class CUR(Policy):
    """Claim: rows of large norm in K and V together span what attention gives, as in a CUR decomposition.

    l_K(t) = ||k_t||^2 / sum over t's window of ||k||^2, the windows being local_window entries in the order of the text
    (None: all of it), l_V alike; score(t) = l_K l_V (leverage="product"), their "mean", "key" or "value", [b, g, m].
    The first sink_size tokens stay. Source: CurDKV, arXiv 2509.15038; NVIDIA/kvpress `cur_press.py`, whose windows
    these are (the paper's leverage is by norms over the whole). sketch=r: rows are first multiplied by a Gaussian
    matrix [d, r] (paper: 20) of this seed, keys and values by the same.
    """

    sink_size: int = 4
    leverage: str = "product"
    local_window: int | None = 16
    sketch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("CUR", "sink_size", self.sink_size, 0)
        for field in ("local_window", "sketch"):
            if getattr(self, field) is not None:
                whole_number("CUR", field, getattr(self, field), 1)
        if self.leverage not in OF:
            raise ValueError(f"CUR: leverage is one of {', '.join(OF)}; got {self.leverage!r}")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    def score(self, view: View) -> Tensor:
        one_text(view, "CUR")
        text = TextOrder.of(view)
        keys, values = (self._share(self._norms(rows, view.alive), text) for rows in (view.keys, view.values))
        made = {"key": keys, "value": values, "mean": (keys + values) / 2, "product": keys * values}[self.leverage]
        return made.masked_fill(text.rank < self.sink_size, torch.inf)

    def _norms(self, rows: Tensor, alive: Tensor) -> Tensor:
        """Squared, [b, g, m]; what is dead takes nothing from the others."""
        rows = wide(rows)
        if self.sketch is not None:
            draw = torch.Generator().manual_seed(self.seed)
            matrix = torch.randn(rows.shape[-1], self.sketch, generator=draw, dtype=torch.float64)
            rows = rows @ (matrix * self.sketch**-0.5).to(rows)
        return rows.square().sum(-1).masked_fill(~alive, 0)

    def _share(self, norms: Tensor, text: TextOrder) -> Tensor:
        sorted_norms, m = text.sort(norms), norms.shape[-1]
        step = min(m, self.local_window or m)
        cut = pad(sorted_norms, (0, -m % step)).unflatten(-1, (-1, step))
        share = cut / cut.sum(-1, keepdim=True).clamp_min(torch.finfo(cut.dtype).tiny)
        return text.unsort(share.flatten(-2)[..., :m])
