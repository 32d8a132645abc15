"""HeadMask: training steps without some of the heads, so that none is relied on and none is left untrained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manyheads.functional.multihead import Heads
from manyheads.mechanism import Mechanism


class HeadMask:
    """Hooks on all mechanisms of a model that set the outputs of chosen heads to zero: Att_h xi_h, xi_h in {0, 1}.

        with HeadMask(model, count=18) as heads:
            heads.draw()                        # the next passes lack 18 random heads, or:
            heads.most_important(loss_of)       # those that the loss of this batch depends on most

    Heads are counted over the whole model, those of a mechanism that is made of several attentions for each of them,
    and are not scaled up for those missing. Importance of a head: the sum over the batch of |dL / dxi_h|, from one pass
    with all heads. A model out of training mode is left alone.

    The hooks sit where head outputs stand side by side: at the input of a mechanism's `o_proj`, where it is as wide as
    its heads, and of its `Heads`. outputs: paths inside a mechanism, such as "attention.o_proj", where that is
    elsewhere; a mechanism with none of them is refused.
    Source: Sun et al., Alleviating the Inequality of Attention Heads for Neural Machine Translation,
    arXiv:2009.09672: its two ways (at random, by importance), counted as in its results (18 of a model's heads). No
    code is known; importance is the gradient of Michel et al., arXiv:1905.10650.
    """

    def __init__(self, model: nn.Module, *, count: int, outputs: Sequence[str] = ()) -> None:
        self.model = model
        found: dict[nn.Module, Mechanism] = {}
        for mechanism in model.modules():
            if isinstance(mechanism, Mechanism):
                found.update(dict.fromkeys(_joins(mechanism, outputs), mechanism))
        if not found:
            raise ValueError(f"HeadMask: {type(model).__name__} has no mechanism of manyheads, whose heads it masks")
        total = sum(mechanism.heads for mechanism in found.values())
        if not 0 <= count < total:
            raise ValueError(f"HeadMask: count={count} of {total} heads in the model; want 0 to {total - 1}")
        self.count, self.total = count, total
        self.kept = torch.ones(total, dtype=torch.bool)
        self._gates: dict[tuple[int, int], Tensor] | None = None  # xi of the pass that is measured: [batch, heads]
        self._handles: list[RemovableHandle] = []
        first = 0
        for linear, mechanism in found.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(mechanism, first)))
            first += mechanism.heads

    def draw(self) -> None:
        """Masks `count` heads at random."""
        self._mask(torch.randperm(self.total)[: self.count])

    def most_important(self, loss_of: Callable[[], Tensor]) -> Tensor:
        """Masks the `count` heads on which the loss depends most, and returns the importance of all. loss_of runs the
        model on the batch, with all heads, and returns its loss; no gradient is left on the parameters."""
        self._gates = {}
        self.kept = torch.ones_like(self.kept)
        try:
            with torch.enable_grad():
                loss = loss_of()
            if not self._gates:
                raise ValueError("HeadMask: no mechanism ran in training mode; call model.train() first")
            gradients = torch.autograd.grad(loss, list(self._gates.values()), allow_unused=True)
            importance = torch.zeros(self.total, dtype=loss.dtype)
            for (first, _), gradient in zip(self._gates, gradients, strict=True):
                if gradient is not None:
                    importance[first : first + gradient.shape[1]] += gradient.abs().sum(0).cpu().to(loss.dtype)
        finally:
            self._gates = None
        self._mask(importance.topk(self.count).indices)
        return importance

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HeadMask:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _mask(self, heads: Tensor) -> None:
        self.kept = torch.ones_like(self.kept)
        self.kept[heads] = False

    def _hook(self, mechanism: Mechanism, first: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def before(linear: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            joined: Tensor = arguments[0]
            kept = self.kept[first : first + mechanism.heads]
            # The linear's own mode: a copy of the model, for a running average say, has this hook and another mode; and
            # it keeps the hook when that is removed here.
            if not self._handles or not linear.training or (self._gates is None and bool(kept.all())):
                return None
            gate = kept.to(joined).expand(joined.shape[0], -1)
            if self._gates is not None:
                # One per example, so that examples do not cancel out; the same one where a pass comes here again.
                gate = self._gates.setdefault((first, len(joined)), gate.clone().requires_grad_())
            wide = gate.repeat_interleave(joined.shape[-1] // mechanism.heads, -1)
            return (joined * wide.view(len(joined), *[1] * (joined.ndim - 2), -1), *arguments[1:])

        return before


def _joins(mechanism: Mechanism, outputs: Sequence[str]) -> list[nn.Module]:
    """The linears of a mechanism that read its heads side by side."""
    if outputs:
        named = dict(mechanism.named_modules())
        joins = [named[path] for path in outputs if path in named]
    else:
        joins = [part.o_proj for part in mechanism.modules() if isinstance(part, Heads)]
        own = getattr(mechanism, "o_proj", None)
        head_dim = getattr(mechanism, "head_dim", None)
        wide = mechanism.dim if head_dim is None else mechanism.heads * head_dim
        # With an adapter in it, or in few bits, it is no nn.Linear.
        if isinstance(own, nn.Module) and getattr(own, "in_features", None) == wide:
            joins.append(own)
    if not joins or any(getattr(join, "in_features", 1) % mechanism.heads for join in joins):
        looked = list(outputs) or ["o_proj"]
        raise ValueError(
            f"HeadMask: {mechanism.card.name} has no linear {looked} that reads its {mechanism.heads} heads side by "
            "side; name those that do with outputs="
        )
    return joins
