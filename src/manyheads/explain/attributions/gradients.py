"""Input gradients and integrated gradients, as captum has them, on embeddings or pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution
from manyheads.explain.attributions.feed import Feed, Position, Target, per_row, score_of
from manyheads.hosts.sites import shows_pictures_to_text

EMBEDS = ("inputs_embeds", "decoder_inputs_embeds")


class _Gradient(Attribution):
    """Token ids are read as the vectors that the model looks up for them, which have a gradient; a picture's numbers
    are added up by patch, with zeros for tokens that are no patches."""

    of_target = True

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        if feed.named.get("pixel_values") is not None and shows_pictures_to_text(self.model):
            raise ValueError(
                f"{type(self.model).__name__} puts its pictures in the place of tokens' embeddings, whose gradients "
                "here do not see them: use attention-gradient, relevance or leave_one_out"
            )
        trace = self.trace(feed, target, position)  # checks the target, and knows the streams
        found = feed.embeddings()
        named = {**feed.named, **found}
        names = [name for name in (*found, *EMBEDS, feed.main) if _smooth(named.get(name))]
        if not names or ("decoder" in trace.real and "encoder" in trace.real and len(names) < 2):
            wanted = "input_ids (and decoder_input_ids) or floating inputs"
            raise ValueError(f"gradients need {wanted}; got {sorted(feed.named)}")
        names = list(dict.fromkeys(names))
        fixed = Feed(
            self.model, {name: value for name, value in feed.named.items() if name in found or name not in names}
        )
        asked = None if isinstance(position, str) else position
        at = trace.place(asked) if self.score is None else None

        def forward(*given: Tensor) -> Tensor:
            times = given[0].shape[0] // feed.rows
            put = dict(zip(names, given, strict=True))
            own = fixed.tiled(times, feed.rows, {name: value for name, value in put.items() if name not in found})
            own = replace(own, vectors={name: value for name, value in put.items() if name in found})
            asked = target if target is None else per_row(target, feed.rows, "target", feed.device).repeat(times)
            place = at if at is None else per_row(at, feed.rows, "position", feed.device).repeat(times)
            return score_of(own.plain(), own, asked, place, self.score)

        given = tuple(named[name].detach().requires_grad_() for name in names)
        with torch.enable_grad():
            gradients = self._attributed(forward, given)
        values = {}
        for name, gradient in zip(names, gradients, strict=True):
            stream = _stream(name, trace.real)
            values[stream] = self._by_token(gradient.detach(), feed, trace.real[stream].shape[1])
        return trace.finish(values)

    def _by_token(self, gradient: Tensor, feed: Feed, n: int) -> Tensor:
        if gradient.dim() == 3:
            return self._fold(gradient, (2,))
        patches = feed.patches
        (high, wide), rows, columns = patches.size, patches.rows, patches.columns
        if n != patches.tokens:
            raise ValueError(f"{type(self.model).__name__} attends with {n} tokens, its picture has {patches.tokens}")
        tiles = gradient[..., : rows * high, : columns * wide]
        tiles = tiles.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        return patches.sequence(self._fold(tiles, (1, 3, 5)))

    def _fold(self, gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
        return gradient.sum(dims)

    def _attributed(self, forward: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raise NotImplementedError


class Saliency(_Gradient):
    """a_j = || dy/dx_j ||_2 over a token's embedding, as captum.attr.Saliency gives dy/dx. (Simonyan et al., arXiv
    1312.6034, take the largest |.| over colour channels; a norm does not depend on the embedding's axes.)"""

    def _attributed(self, forward: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _slopes(forward, given)

    def _fold(self, gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
        return gradient.square().sum(dims).sqrt()


class InputGradient(_Gradient):
    """a_j = x_j . dy/dx_j (arXiv 1605.01713), which is captum.attr.InputXGradient."""

    def _attributed(self, forward: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x * slope for x, slope in zip(given, _slopes(forward, given), strict=True))


def _slopes(forward: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One backward pass; loading captum takes longer than that."""
    return torch.autograd.grad(forward(*given).sum(), given)


class IntegratedGradients(_Gradient):
    """a_j = (x_j - x'_j) . integral of dy/dx_j from x' to x (arXiv 1703.01365); they sum to y(x) - y(x').

    captum.attr.IntegratedGradients on the embeddings, which is its LayerIntegratedGradients on the embedding layer, and
    serves encoder and decoder that share one. baseline: a token id, "zero", or None: the mean of all embeddings. A path
    from zero only scales x, which an RMS norm does not see: everything happens at its first point, where no sum of
    steps finds it. Pictures start from zeros. steps: points of the Gauss-Legendre rule, batch_size of them at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        baseline: int | str | None = None,
        steps: int = 50,
        batch_size: int = 16,
        **shared: Any,
    ):
        super().__init__(model, **shared)
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps={steps}, batch_size={batch_size}: at least one each")
        if isinstance(baseline, str) and baseline != "zero":
            raise ValueError(f"baseline={baseline!r}: a token id, 'zero' or nothing")
        self.baseline, self.steps, self.batch_size = baseline, steps, batch_size

    def _attributed(self, forward: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from captum.attr import IntegratedGradients as Own  # type: ignore[import-not-found,import-untyped,unused-ignore]

        baselines = tuple(self._from(each) for each in given)
        rows = given[0].shape[0]
        found: tuple[Tensor, ...] = Own(forward).attribute(
            given, baselines, n_steps=self.steps, internal_batch_size=max(rows, self.batch_size)
        )
        return found

    def _from(self, given: Tensor) -> Tensor:
        model: Any = self.model
        if self.baseline == "zero" or given.dim() != 3 or not hasattr(model, "get_input_embeddings"):
            return torch.zeros_like(given)
        embedding = model.get_input_embeddings()
        if self.baseline is None:
            mean: Tensor = embedding.weight.detach().mean(0) * getattr(embedding, "embed_scale", 1.0)
            return mean.to(given).expand_as(given)
        token = torch.full(given.shape[:2], int(self.baseline), device=given.device)
        own: Tensor = embedding(token).detach()
        return own


def _smooth(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _stream(name: str, real: dict[str, Tensor]) -> str:
    if len(real) == 1:
        return next(iter(real))
    wanted = "decoder" if name.startswith("decoder") else "vision" if name == "pixel_values" else "encoder"
    if wanted not in real:
        raise ValueError(f"which of the streams {sorted(real)} comes from {name}? gradients cannot tell")
    return wanted
