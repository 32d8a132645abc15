"""Passes of a model with something added to its attention scores, and the direction in which that hurts most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall
from manyheads.hosts.inside import softmax_call
from manyheads.hosts.reading import check_kept
from manyheads.hosts.taps import tap

# What is added to the scores of a call, [b, h, n, m], by the call's number in its pass.
Added = Callable[[int, AttentionCall], Tensor]


def tilted(weights: Tensor, added: Tensor) -> Tensor:
    """softmax(s + r) of the weights softmax(s) and of r, both [..., m]. What a row has given to a sink, which is no
    key, keeps its score; a row that sees nothing stays zero."""
    top = added.amax(-1, keepdim=True).clamp_min(0.0)
    raised = weights * (added - top).exp()
    sunk = (1.0 - weights.sum(-1, keepdim=True)).clamp_min(0.0) * (-top).exp()
    return raised / (raised.sum(-1, keepdim=True) + sunk).clamp_min(torch.finfo(weights.dtype).tiny)


def unit(rows: Tensor) -> Tensor:
    """Each row [..., m] by its length; zeros stay. By its largest entry first: squares of small gradients vanish."""
    top = rows.abs().amax(-1, keepdim=True)
    rows = rows / top.masked_fill(top == 0, 1.0)
    length = rows.norm(dim=-1, keepdim=True)
    return rows / length.masked_fill(length == 0, 1.0)


def uneven(weights: Tensor) -> Tensor:
    """[..., 1]: whether a row tells its keys apart, by the scores of those that it weighs at all."""
    seen = weights > 0
    low = weights.masked_fill(~seen, torch.inf).amin(-1, keepdim=True)
    return (weights.amax(-1, keepdim=True) > low) & seen.any(-1, keepdim=True)


def zeros(number: int, call: AttentionCall) -> Tensor:
    b, h, n, _ = call.query.shape
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    return torch.zeros(b, h, n, call.key.shape[2], dtype=dtype, device=call.query.device)


class Passes:
    """Passes over one batch, `run()`, that draw the same dropout, so that they differ by what is added alone. The
    weights that are mixed have no dropout of their own in any of them.

    who: for messages. where: layers, stack, kind of `tap`. ValueError for attention that is no softmax of scores, and
    for reentrant checkpointing, which keeps no graph to differentiate."""

    def __init__(self, model: nn.Module, run: Callable[[], Tensor], who: str, where: dict[str, Any]) -> None:
        check_kept(model, who)
        self.model, self.run, self.who, self.where = model, run, who, where
        self._first = _draws()

    def added(self, by: Added) -> Tensor:
        """run() with by(number, call) added to the scores of every call."""
        count = 0

        def reader(call: Any) -> Tensor:
            nonlocal count
            own = softmax_call(call, self.who)
            # Backward may compute a layer anew: the same call then, with the same number.
            if "number" not in call.memo:
                call.memo["number"] = count
                count += 1
            r = by(call.memo["number"], own)
            return own.mix(lambda weights, rows: tilted(weights, r[:, :, rows].to(weights.dtype)))

        _draw_as(self._first)
        with tap(self.model, reader, **self.where):
            found = self.run()
        if count == 0:
            raise ValueError(f"{self.who}: the pass met none of the model's attention: run the model inside of it")
        return found

    def gradients(self, start: Added, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """d loss(run()) / dr of every call at r = start(number, call), [b, h, n, m] each. Parameters get none."""
        leaves: list[Tensor] = []

        def leaf(number: int, call: AttentionCall) -> Tensor:
            if number == len(leaves):
                # Once, and not when backward computes the layer anew: no part of what a checkpoint counts.
                with torch.no_grad():
                    leaves.append(start(number, call))
                leaves[number].requires_grad_()
            return leaves[number]

        with torch.enable_grad():
            found = loss(self.added(leaf))
        if found.dim() or not found.requires_grad:
            raise ValueError(
                f"{self.who}: wants one number with a graph behind it; got {list(found.shape)}, requires_grad="
                f"{found.requires_grad}"
            )
        each = torch.autograd.grad(found, leaves, allow_unused=True)
        return [torch.zeros_like(r) if g is None else g for r, g in zip(leaves, each, strict=True)]


def listed(added: list[Tensor]) -> Added:
    """What is added, as one finds it; ValueError where a pass has other calls than the one that it was made in."""

    def by(number: int, call: AttentionCall) -> Tensor:
        wanted = (*call.query.shape[:3], call.key.shape[2])
        if number >= len(added) or added[number].shape != wanted:
            raise ValueError(f"{call.site.name}: another call than in the pass before; run the same batch every time")
        return added[number]

    return by


def scaled(by: Added, length: float) -> Added:
    return lambda number, call: length * by(number, call)


def along_differences(by: Added) -> Added:
    """The same as a sum of unit differences d_t = (s_t - s_k)_k / ||.||_2: of a row of even scores there are none."""

    def limited(number: int, call: AttentionCall) -> Tensor:
        with torch.no_grad():
            return by(number, call) * uneven(call.weights())

    return limited


def check_sizes(who: str, **sizes: float) -> None:
    wrong = {name: value for name, value in sizes.items() if not 0 <= value < float("inf")}
    if wrong:
        raise ValueError(f"{who}: {wrong}; want lengths of what is added to a row of scores, 0 or above")


def _draws() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _draw_as(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
