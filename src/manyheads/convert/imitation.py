"""What a mechanism learns from the softmax attention that it replaces, on the same inputs: three published losses.

output   |o - o'|^2 / |o'|^2 of the whole layer's output; trains all of the mechanism
heads    1000 mean (y - y')^2 of the heads' outputs before they are joined (LoLCATs, Zhang et al., arXiv:2410.10254)
weights  mean over queries of - sum_j a'_ij log a_ij, the cross-entropy of attention weights (Hedgehog,
         arXiv:2402.04347)

A prime marks softmax's. The last two train only what the host's weights do not fill: feature maps, factors; the rest
stays as it is, as in the released code of LoLCATs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Seen(NamedTuple):
    """One pass of the layer that is learnt from: x and its output [b, n, e], its heads' outputs [b, n, h d]."""

    x: Tensor
    output: Tensor
    heads: Tensor


@dataclass(frozen=True)
class Loss:
    """apart: of the mechanism, the softmax layer and what that saw and gave. whole: trains all of the mechanism."""

    apart: Callable[[Any, Any, Seen], Tensor]
    whole: bool
    rate: float


def _output(learner: Any, teacher: Any, seen: Seen) -> Tensor:
    return (learner(seen.x).output - seen.output).square().sum() / seen.output.square().sum()


def _heads(learner: Any, teacher: Any, seen: Seen) -> Tensor:
    held: dict[str, Tensor] = {}
    with before_joining(learner, lambda heads: held.update(heads=heads)):
        learner(seen.x)
    if held["heads"].shape != seen.heads.shape:
        raise ValueError(
            f"{learner.card.name}: its heads give {tuple(held['heads'].shape)}, softmax's {tuple(seen.heads.shape)}: "
            "these cannot be compared, take --transfer-loss output"
        )
    return 1000 * (held["heads"] - seen.heads).square().mean()


def _weights(learner: Any, teacher: Any, seen: Seen) -> Tensor:
    with torch.no_grad():
        wanted = teacher(seen.x, need_weights=True).weights
    found = learner(seen.x, need_weights=True).weights
    if found is None or found.shape != wanted.shape:
        raise ValueError(f"{learner.card.name}: gives no weights of tokens: take --transfer-loss output")
    return -(wanted * found.clamp(min=torch.finfo(found.dtype).tiny).log()).sum(-1).mean()


LOSSES: Mapping[str, Loss] = {
    "output": Loss(_output, True, 1e-3),
    "heads": Loss(_heads, False, 1e-2),
    "weights": Loss(_weights, False, 1e-2),
}


def check_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"--transfer-loss {name!r}: want one of {', '.join(LOSSES)}")
    return LOSSES[name]


@contextmanager
def before_joining(mechanism: Any, tell: Callable[[Tensor], Any]) -> Iterator[None]:
    """Tells what the heads give to the projection that joins them."""
    joins = getattr(mechanism, "o_proj", None)
    if not isinstance(joins, nn.Linear):
        raise ValueError(f"{mechanism.card.name}: has no o_proj that joins its heads: take --transfer-loss output")
    hook = joins.register_forward_pre_hook(lambda module, args: tell(args[0]))
    try:
        yield
    finally:
        hook.remove()


def learnt(learner: Any, teacher: Any, loss: Loss) -> list[nn.Parameter]:
    """The parameters that a loss trains; ValueError where there are none."""
    filled = dict(teacher.named_parameters())
    found = [
        parameter
        for name, parameter in learner.named_parameters()
        if loss.whole or name not in filled or not _fits(name, parameter, filled[name])
    ]
    if not found:
        raise ValueError(
            f"{learner.card.name}: the host's weights fill all of it, so that heads and weights have nothing to train: "
            "take --transfer-loss output"
        )
    return found


def _fits(name: str, ours: Tensor, theirs: Tensor) -> bool:
    """Keys and values may be repeated, for a mechanism that shares none."""
    repeated = name.startswith(("k_proj", "v_proj")) and ours.shape[0] % theirs.shape[0] == 0
    return ours.shape == theirs.shape or (repeated and ours.shape[1:] == theirs.shape[1:])
