"""StreamingLLM: the first tokens and the latest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.functional.rotary import turn
from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy


@dataclass(kw_only=True)
class StreamingLLM(Policy):
    """Claim: a model stays fluent for ever on its first few tokens, where attention sinks, and the recent ones.

    keep(t) = position(t) < sink_size, then the latest, to the budget. Room is made before a token comes, so its query
    sees at most the budget, itself included. Positions are those in the cache: 0 .. length - 1.
    Source: arXiv 2309.17453, mit-han-lab/streaming-llm `kv_cache.py`, `pos_shift/`. Room is made before tokens, as by
    its `evict_for_space`; where the code evicts after each token (`eval_long_ppl.py`) a query sees the budget and
    itself, one more. A prompt's eviction waits for the next token there; here it happens at once. There keys are kept
    unrotated and all are rotated for every token; here the sinks alone are turned by the number of dropped tokens,
    which gives every query the same distances.
    positions="text" leaves distances as they are in the text, for models whose positions cannot be moved.
    """

    sink_size: int = 4
    positions: str = "cache"
    evicts_before: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.sink_size, int) or self.sink_size < 0:
            raise ValueError(f"StreamingLLM: sink_size must be a whole number of at least 0; got {self.sink_size!r}")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    @property
    def moves(self) -> bool:
        """Its sinks alone are turned, in the policy's own way, but where tokens between stay too."""
        return self.protect is not None and super().moves

    def score(self, view: View) -> Tensor:
        return recency(view, self.sink_size)

    def worst(self, view: View) -> Tensor | int:
        place = view.group.oldest(self.sink_size)
        return super().worst(view) if place is None else place

    def prepare(self, model: Any, cache: Any) -> None:
        if self.positions == "text" or self.is_full or not self.sink_size or self.moves:
            return
        from manyheads.hosts.families import rotations

        known: list[Tensor] = []
        for layer, angles in zip(cache.layers, rotations(model), strict=True):
            # Behind a window no sink is ever seen.
            if angles is None or layer.window is not None:
                layer.angles = None
                continue
            # One tensor for all layers that turn alike, so that they can share what is made of it.
            layer.angles = next((own for own in known if torch.equal(own, angles)), angles)
            known.append(layer.angles)

    def placed(self, layer: Any, view: View) -> None:
        if layer.angles is None or view.group.first is not None:
            return
        if view.passes[-1].seen.padding is None and view.group.filled:
            self._turn_alike(layer, view)
            return
        held = view.slots >= 0
        gap = view.count[:, None] - held.sum(-1)
        order = torch.where(held, view.positions, 2 * view.total).argsort(-1)[..., : self.sink_size]
        sinks = (held & (view.positions < self.sink_size)).gather(-1, order)[..., None]
        here = view.group.pick("keys", order)
        # Turned from the keys as they came, every time: turning a turned key would gather rounding errors.
        came = torch.where((layer.memo["gap"] == 0)[..., None, None], here, layer.memo["sinks"]) if layer.memo else here
        turned = torch.where(sinks, turn(came, gap[..., None], layer.angles.to(here.device)), here)
        view.put(order, keys=turned)
        layer.memo = {"sinks": came, "gap": gap}

    def _turn_alike(self, layer: Any, view: View) -> None:
        """Without padding the sinks are the first entries of every row and as far behind in all, in every layer."""
        gap, turning = view.total - view.group.length, 2 * layer.angles.numel()
        sinks = view.keys.narrow(2, 0, min(self.sink_size, view.group.length))
        came = layer.memo["sinks"] if layer.memo else sinks.clone()
        known = view.shared.get("turn")
        if known is None or known[0] != gap or known[1] is not layer.angles or known[2].shape != came.shape[:2]:
            angle = (gap * layer.angles).to(sinks.device)
            sin = angle.sin()
            gaps = came.new_full(came.shape[:2], gap, dtype=torch.long)
            view.shared["turn"] = known = gap, layer.angles, gaps, angle.cos().repeat(2), torch.cat([-sin, sin])
        _, _, gaps, cos, sin = known
        layer.memo = {"sinks": came, "gap": gaps}
        if turning < came.shape[3]:
            came, sinks = came.narrow(3, 0, turning), sinks.narrow(3, 0, turning)
        sinks.copy_(torch.addcmul(came * cos, came.roll(turning // 2, -1), sin))


def recency(view: View, sink_size: int) -> Tensor:
    """Positions, with the sinks above all of them."""
    positions = view.positions
    return (positions + (positions < sink_size) * (2 * view.total + 1)).double()
