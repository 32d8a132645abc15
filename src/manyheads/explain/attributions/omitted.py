"""A causal model's logits with some of its tokens masked, computed without those tokens: nobody sees them.

Claim: a masked token is read by no other, and what it reads itself is read by nobody. So the pass over the tokens that
stay, each at its own position, gives the logits of the pass over all tokens under the mask. It takes as long as the
tokens that stay: a deletion curve half, an empty text next to nothing; and logits at the one place that is read.
Holds where positions are handed over and a layer's window is not counted in tokens of the row; so models with windows
are left alone, and on the first use a row is computed both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.explain.attributions.feed import Feed

_KNOWN = {"input_ids", "attention_mask", "position_ids"}
_NEEDED = ("attention_mask", "position_ids", "logits_to_keep", "use_cache")


@dataclass(frozen=True)
class Omitted:
    """one: a batch of one row. at: the place whose logits are asked for; what comes after it is nobody's business."""

    one: Feed
    at: int

    @classmethod
    def of(cls, one: Feed, at: int, keep: Tensor, whole: Callable[[Tensor], Tensor]) -> Omitted | None:
        """None where the model has to see all tokens. whole(keep [1, n]): logits [1, vocabulary] under the mask, which
        the shorter pass has to give for this row."""
        given = {name for name, value in one.named.items() if value is not None}
        mask = one.named.get("attention_mask")
        if not given <= _KNOWN or one.main != "input_ids" or (mask is not None and mask.dim() != 2):
            return None
        if not all(one.takes(name) for name in _NEEDED) or _windowed(getattr(one.model, "config", None)):
            return None
        found = cls(one, at)
        wanted, own = whole(keep).float(), found.logits(keep).float()
        limit = 1e-4 if one.model.dtype in (torch.float32, torch.float64) else 3e-2
        same = float((wanted - own).abs().max()) <= limit * float(wanted.abs().max().clamp_min(1e-6))
        return found if same else None

    def logits(self, keep: Tensor) -> Tensor:
        """[k, vocabulary] for keep [k, n], True = stays."""
        named, k = self.one.named, keep.shape[0]
        mask = named.get("attention_mask")
        keep = (keep if mask is None else keep & (mask > 0))[:, : self.at + 1]
        length = int(keep.sum(1).max())
        # Those that stay come last in their order; a shorter row is padded on its left.
        order = keep.long().argsort(dim=1, stable=True)[:, -length:]
        positions = named.get("position_ids")
        positions = order if positions is None else positions.expand(k, -1).gather(1, order)
        output: Any = self.one.model(
            input_ids=named["input_ids"].expand(k, -1).gather(1, order),
            attention_mask=keep.gather(1, order).long(),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _windowed(config: Any) -> bool:
    """Whether a layer counts how far back it sees in tokens of the row."""
    own = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    if own is None:
        return True
    kinds = getattr(own, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return any(getattr(own, name, None) for name in ("sliding_window", "window_size", "attention_window"))
