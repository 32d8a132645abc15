"""Stochastically subsampled attention: in training, every pass attends to a random share of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Pattern
from manyheads.checks import Context
from manyheads.functional.drawing import draw, share
from manyheads.functional.shuffled import draw_windows, from_windows, into_windows
from manyheads.mechanism import Mechanism, Result
from manyheads.state import State
from manyheads.training.given import check_mechanism_given


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
    saves no time: `LocallySubsampled` leaves them out.
    """

    def __init__(self, mechanism: Mechanism, *, keep: float = 0.25, as_padding: bool = False) -> None:
        super().__init__()
        check_mechanism_given("SubsampledAttention", mechanism)
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
        **inputs: Any,
    ) -> Result:
        options: dict[str, Any] = {"positions": positions, "need_weights": need_weights, **inputs}
        if not (self.training if self.forced is None else self.forced):
            return self.mechanism(x, context, mask=mask, state=state, **options)
        if state is not None:
            raise ValueError("SubsampledAttention: keys are not drawn while decoding; call eval() before using a state")
        pattern = self.mechanism._check_inputs(x, context, inputs)
        if pattern is Pattern.MAPS:
            raise ValueError(
                f"SubsampledAttention: {self.mechanism.card.name} reads several maps, whose cells are not keys "
                "alone; want a mechanism for tokens, a grid or a graph"
            )
        padding, dense = self.mechanism._check_mask(pattern, x, context, mask, None)
        if self.mechanism.sources > 1:
            paddings = [None] * self.mechanism.sources if padding is None else padding
            drawn = tuple(self._draw(*each) for each in zip(context or (), paddings, strict=True))
            return self.mechanism(x, context, mask=drawn, **options)
        kept = self._draw(x if context is None else context, padding)
        alone = self.as_padding or context is not None or pattern in (Pattern.POOL, Pattern.GRID, Pattern.VOLUME)
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


class LocallySubsampled(nn.Module):
    """Self attention that, in training, is computed within windows of a sequence that is shuffled near by.

        order tokens by i / (spread w) + u, u uniform in (-1, 1);   cut into windows of w = keep x n tokens
        y of a window = mechanism(x of the window, in the order of the sequence)

    Drawn anew in every pass and for every sequence; keys of other windows are not computed with, so that attention
    costs keep of its time and memory. spread 0: fixed blocks; 1: neighbours that change; infinity: from everywhere,
    without bias. A token's own key is always there, masks given are obeyed, and w is a share of the longest row's real
    tokens. In eval mode it is the mechanism (`sampling` turns draws on there too). A window keeps the positions of its
    tokens; a mechanism that counts steps instead of reading positions sees the window as a sequence of its own, and its
    auxiliary losses are those of windows. Takes self attention alone: neither context, state nor need_weights.

    Source: Hussain et al., arXiv:2306.01705, locally biased SSA: windowed attention over tokens permuted near by, at a
    cost of 1/k. Its code was not released; the noise of the order is this file's own. `locally_subsampled` does the
    same to a transformers model.
    """

    def __init__(self, mechanism: Mechanism, *, keep: float = 0.25, spread: float = 1.0) -> None:
        super().__init__()
        check_mechanism_given("LocallySubsampled", mechanism)
        _check_drawing("LocallySubsampled", keep, spread)
        self.mechanism, self.keep, self.spread = mechanism, keep, spread
        self.forced: bool | None = None  # set by `sampling`

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
        need_weights: bool = False,
    ) -> Result:
        if not (self.training if self.forced is None else self.forced):
            return self.mechanism(x, context, mask=mask, positions=positions, state=state, need_weights=need_weights)
        pattern = self.mechanism._check_inputs(x, context)
        if pattern not in (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF) or state is not None or need_weights:
            raise ValueError(
                f"LocallySubsampled: {self.mechanism.card.name} as {pattern}, state={state is not None}, need_weights="
                f"{need_weights}; want self attention in training, or call eval() first"
            )
        padding, dense = self.mechanism._check_mask(pattern, x, context, mask, None)
        b, n = x.shape[:2]
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if padding is None else padding
        places, there = draw_windows(real, self.keep, self.spread)
        at = places if positions is None else into_windows(positions.expand(b, -1), places).view_as(places)
        result: Result = self.mechanism(
            into_windows(x, places), mask=self._mask(places, there, dense), positions=at.flatten(0, 1)
        )
        return result._replace(output=from_windows(result.output, places, n))

    def _mask(self, places: Tensor, there: Tensor, dense: Tensor | None) -> Tensor | None:
        """Of the windows: key padding [b c, w], or dense [b c, 1 or h, w, w]."""
        if dense is None:
            return None if bool(there.all()) else there.flatten(0, 1)
        b, c, w = places.shape
        rows = torch.arange(b, device=dense.device)[:, None, None, None]
        own = dense.expand(b, -1, -1, -1).transpose(1, 3)[rows, places[:, :, None], places[..., None]]
        return own.movedim(-1, 2).flatten(0, 1) & there.view(b * c, 1, 1, w)


@contextmanager
def locally_subsampled(model: nn.Module, *, keep: float = 0.25, spread: float = 1.0) -> Iterator[None]:
    """A transformers model whose self attention in training is that of LocallySubsampled, in every layer anew.

        with locally_subsampled(model, keep=0.25):
            model(**batch, labels=labels).loss.backward()

    Rotary and learnt positions, padding, sliding windows, packed documents, soft caps and sinks stay as they are: they
    are of the tokens that meet. No mask [n, n] is made. Left, or in eval mode, the model attends to all keys, as at the
    end of the paper's training. backward may come later, checkpointed layers draw again what they drew.

    Raises ValueError for cross attention, position biases, attention dropout, and keys from a cache.
    """
    from manyheads.hosts.sampled import Drawn, in_windows

    _check_drawing("locally_subsampled", keep, spread)
    with in_windows(model, Drawn(keep, spread)):
        yield


def _check_drawing(who: str, keep: float, spread: float) -> None:
    if not 0 < keep <= 1 or not spread >= 0:
        raise ValueError(
            f"{who}: keep={keep}, spread={spread}; want a share above 0 and at most 1, and a spread from 0"
        )


@contextmanager
def sampling(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Keys are drawn in every SubsampledAttention and LocallySubsampled of the model, in eval mode as well; with
    on=False in none, which is how the paper ends its training: a few steps with all keys."""
    parts = [part for part in model.modules() if isinstance(part, (SubsampledAttention, LocallySubsampled))]
    before = [part.forced for part in parts]
    for part in parts:
        part.forced = on
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.forced = value
