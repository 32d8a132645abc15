"""Stochastically subsampled attention: in training, every pass attends to a random share of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Pattern
from manyheads.functional.drawing import draw, share
from manyheads.mechanism import Context, Mechanism, Result
from manyheads.state import State


class SubsampledAttention(nn.Module):
    """A mechanism that, in training, sees ceil(keep x m) of m keys, drawn anew in every pass and for every sequence.

    One draw holds for all heads and queries of the pass. Called as the mechanism is; in eval mode it is the mechanism,
    with all keys, and `sampling` turns draws on there too: averaging such passes is the paper's ensemble of
    sub-models. Masks given are obeyed, and shares are of the real keys. Contexts and pools are subsampled through their
    key padding, self attention through a dense mask. as_padding=True, for mechanisms that refuse one: tokens that are
    not drawn are padding, and get what the mechanism gives there. Grids are drawn in this way.

    Source: Hussain et al., The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles,
    arXiv:2306.01705 (its unbiased form; code was not released). Here a token always keeps itself as a key, so that
    no causal row is left with nothing (not with as_padding), and keys are masked, which regularises as in the paper but
    saves no time; the paper leaves them out of the computation, and also draws with a bias to near keys.
    """

    def __init__(self, mechanism: Mechanism, *, keep: float = 0.25, as_padding: bool = False) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"SubsampledAttention: keep={keep}; want the share of keys to keep, above 0 and at most 1")
        self.mechanism, self.keep, self.as_padding = mechanism, keep, as_padding
        self.forced: bool | None = None  # set by `sampling`

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        mask: Tensor | Sequence[Tensor] | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
        need_weights: bool = False,
    ) -> Result:
        options: dict[str, Any] = {"positions": positions, "need_weights": need_weights}
        if not (self.training if self.forced is None else self.forced):
            return self.mechanism(x, context, mask=mask, state=state, **options)
        if state is not None:
            raise ValueError("SubsampledAttention: keys are not drawn while decoding; call eval() before using a state")
        pattern = self.mechanism._check_inputs(x, context)
        padding, dense = self.mechanism._check_mask(pattern, x, context, mask, None)
        if self.mechanism.sources > 1:
            paddings = [None] * self.mechanism.sources if padding is None else padding
            drawn = tuple(self._draw(*each) for each in zip(context or (), paddings, strict=True))
            return self.mechanism(x, context, mask=drawn, **options)
        kept = self._draw(x if context is None else context, padding)
        alone = self.as_padding or context is not None or pattern in (Pattern.POOL, Pattern.GRID)
        if dense is None and alone:
            return self.mechanism(x, context, mask=kept, **options)
        allowed = kept[:, None, None]
        if context is None:
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            allowed = allowed | (itself if padding is None else itself & padding[:, None, None])
        if dense is not None:
            return self.mechanism(x, context, mask=allowed & dense, **options)
        try:
            return self.mechanism(x, mask=allowed, **options)
        except ValueError as error:
            raise ValueError(f"SubsampledAttention: {error}; or build it with as_padding=True") from error

    def _draw(self, keys: Any, padding: Tensor | None) -> Tensor:
        """The keys that are seen, [batch, m], or [batch, height, width] of a grid."""
        real = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if padding is None else padding
        rows = real.flatten(1)
        return draw(rows, share(rows, self.keep)).view_as(real)


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
