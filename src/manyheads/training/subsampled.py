"""Stochastically subsampled attention: in training, every pass attends to a random share of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Pattern
from manyheads.functional.drawing import draw, share
from manyheads.mechanism import Mechanism, Result
from manyheads.state import State


class SubsampledAttention(nn.Module):
    """A mechanism that, in training, sees ceil(keep x m) of m keys, drawn anew in every pass and for every sequence.

    One draw holds for all heads and queries of the pass. Called as the mechanism is; in eval mode it is the mechanism,
    with all keys, and `sampling` turns draws on there too: averaging such passes is the paper's ensemble of
    sub-models. Masks given are obeyed, and shares are of the real keys. Self attention needs a mechanism that obeys
    dense masks; a context and a pool are subsampled through their key padding.

    Source: Hussain et al., The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles,
    arXiv:2306.01705 (its unbiased form; code was not released). Here a token always keeps itself as a key, so that
    no causal row is left with nothing, and keys are masked, which regularises as in the paper but saves no time; the
    paper leaves them out of the computation, and also draws with a bias to near keys.
    """

    def __init__(self, mechanism: Mechanism, *, keep: float = 0.25) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"SubsampledAttention: keep={keep}; want the share of keys to keep, above 0 and at most 1")
        if mechanism.sources > 1:
            raise ValueError(
                f"SubsampledAttention: {mechanism.card.name} attends to several contexts; want one at most"
            )
        self.mechanism, self.keep = mechanism, keep
        self.forced: bool | None = None  # set by `sampling`

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
        need_weights: bool = False,
    ) -> Result:
        options: dict[str, Any] = {"positions": positions, "need_weights": need_weights}
        if not (self.training if self.forced is None else self.forced):
            return self.mechanism(x, context, mask=mask, state=state, **options)
        if state is not None:
            raise ValueError("SubsampledAttention: keys are not drawn while decoding; call eval() before using a state")
        return self.mechanism(x, context, mask=self._drawn(x, context, mask), **options)

    def _drawn(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"SubsampledAttention: x has shape {tuple(x.shape)}; want a sequence [batch, n, dim]")
        keys = x if context is None else context
        real = torch.ones(keys.shape[:2], dtype=torch.bool, device=x.device)
        if mask is not None and mask.ndim == 2:
            real = mask
        kept = draw(real, share(real, self.keep))
        dense = mask if mask is not None and mask.ndim == 4 else None
        if dense is None and (context is not None or Pattern.POOL in self.mechanism.card.patterns):
            return kept
        allowed = kept[:, None, None].expand(-1, 1, x.shape[1], -1)
        if context is None:
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            allowed = allowed | (itself & real[:, None, None])
        return allowed if dense is None else allowed & dense


@contextmanager
def sampling(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Keys are drawn in every SubsampledAttention of the model, in eval mode as well; with on=False in none, which is
    how the paper ends its training: a few steps with all keys."""
    parts = [part for part in model.modules() if isinstance(part, SubsampledAttention)]
    before = [part.forced for part in parts]
    for part in parts:
        part.forced = on
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.forced = value
