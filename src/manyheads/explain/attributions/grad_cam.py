"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) on tokens, on attention, and as a grid of patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.base import Attributed, Attribution, Trace, blocks, check_layer
from manyheads.explain.attributions.feed import Feed, Position, Target
from manyheads.explain.attributions.grid import layout
from manyheads.explain.attributions.raw import pick
from manyheads.hosts.taps import sites


class GradCAM(Attribution):
    """relu(sum_k alpha_k A_k), alpha_k = mean over tokens of dy/dA_k, on one layer.

    over="tokens": A [n, e] is what the layer's attention reads (after its norm), k its e channels; the gradient is that
    which comes through the attention. The paper has feature maps of a CNN; for vision transformers, code in use takes
    the last block's first norm, since behind the last block only the class token has a gradient. over="attention": A is
    row p of the weights and k the heads (the baseline of arXiv 2012.09838). Class, register and detection tokens of
    vision models are no part of the mean. layer: counted within every stream. Shapes: [b, n], every token in its place;
    `token_grid` makes it [b, rows, columns].
    """

    of_target = True

    def __init__(self, model: nn.Module, *, over: str = "tokens", layer: int = -1, **shared: Any):
        super().__init__(model, **shared)
        if over not in ("tokens", "attention"):
            raise ValueError(f"over={over!r}: 'tokens' or 'attention'")
        self.over, self.layer = over, layer

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        read: list[Tensor | None] = []

        def watch(calls: list[Any]) -> Any:
            return _reading(self.model, calls, read)

        trace = self.trace(feed, target, position, gradients=True, watch=watch)
        check_layer(trace, self.layer)
        found = {}
        for stream, real in trace.real.items():
            counted = real.clone()
            patches = layout(feed, stream)
            if patches is not None:
                counted[:, : patches.first] = counted[:, patches.stop :] = False
            tokens = self.over == "tokens"
            own = self._tokens(trace, stream, read) if tokens else self._attention(trace, stream, position)
            if own is not None:
                values, slopes = own
                share = counted[..., None] / counted.sum(-1)[:, None, None]
                alpha = (slopes.masked_fill(~counted[..., None], 0) * share).sum(1)
                found[stream] = torch.einsum("bmk,bk->bm", values, alpha.to(values.dtype)).clamp_min(0)
        return trace.finish(found)

    def _tokens(self, trace: Trace, stream: str, read: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        own = [i for i, step in enumerate(trace.steps) if step.reader == step.source == stream]
        if not own or not -len(own) <= self.layer < len(own):
            raise ValueError(f"layer {self.layer}: stream {stream} has {len(own)} layers of self-attention")
        hidden = read[own[self.layer]]
        if hidden is None:
            raise ValueError(f"{trace.steps[own[self.layer]].call.site.path} reads no hidden states [b, n, e]")
        slope = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        return hidden.detach(), slope

    def _attention(self, trace: Trace, stream: str, position: Position) -> tuple[Tensor, Tensor] | None:
        step, start = pick(trace, stream, self.layer), trace.start(position)
        if step is None:
            return None
        share = start[step.reader][:, None, None]
        values, slopes = [], []
        for rows in blocks(step.call, start[step.reader]):
            values.append((share[..., rows] @ step.call.weights(None, rows).to(share.dtype))[:, :, 0])
            slopes.append((share[..., rows] @ step.call.weight_gradients(None, rows).to(share.dtype))[:, :, 0])
        return sum(values[1:], start=values[0]).transpose(1, 2), sum(slopes[1:], start=slopes[0]).transpose(1, 2)


@contextmanager
def _reading(model: nn.Module, calls: list[Any], read: list[Tensor | None]) -> Iterator[None]:
    """Fills `read` with the hidden states of every call, in the calls' order, each an alias that keeps its gradient."""
    waiting: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            waiting[:] = [None]
            return None
        alias = hidden.view_as(hidden) if hidden.requires_grad else hidden.detach().requires_grad_()
        alias.retain_grad()
        waiting[:] = [alias]
        return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": alias})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read.extend(waiting * (len(calls) - len(read)))

    hooks: list[Any] = []
    for site in sites(model):
        hooks.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(site.module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
