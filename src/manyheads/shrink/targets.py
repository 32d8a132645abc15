"""How many entries each head may keep just now: found out once for all layers that hold alike and are told alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from manyheads.hosts.visibility import Visibility


class Targets(NamedTuple):
    """entries [b or 1, H] for every head; over: by how many the longest head stands above; even: the number of entries
    [1, 1], where it is one for all rows and heads and every head stands as far above."""

    entries: Tensor
    over: int
    even: Tensor | None


def find_targets(
    layer: Any, policy: Any, seen: Visibility, coming: int, fresh: bool, view: Callable[[], Any]
) -> Targets:
    """view: makes what the policy is shown, where nothing is known yet."""
    groups, shares = layer.store.groups, None if policy.allocation is None else layer.shares
    held = (groups[0].length, len(groups[0].heads)) if len(groups) == 1 else tuple(layer.store.lengths())
    apart = layer.apart or shares is not None or layer.window is not None
    asked = (id(policy), fresh, held, layer.index if apart else None)
    shared, name, total = layer.shared, f"targets {coming}", layer.seen
    known = shared.get(name)
    # The padding itself, not what it says: every layer of a pass is given the same tensor.
    if known is None or known[0] != total or known[1] is not seen.padding:
        shared[name] = known = total, seen.padding, {}
    told: dict[Any, Targets] = known[2]
    if asked not in told:
        told[asked] = _find(layer, policy, view(), coming, None if fresh else shares)
    return told[asked]


def _find(layer: Any, policy: Any, view: Any, coming: int, shares: Tensor | None) -> Targets:
    lengths = layer.store.lengths()
    mean = policy.mean_target(layer, view)
    targets = policy.targets(mean, layer, len(lengths))
    if shares is not None:
        targets = (shares * mean.floor()[:, None]).round().long()
    targets = less(policy, targets, coming)
    above = torch.tensor(lengths)[None] - targets
    even = int(above.min()) == int(above.max()) and len(set(lengths)) == 1
    return Targets(targets, int(above.max()), targets[:1, :1].to(view.group.index.device) if even else None)


def less(policy: Any, targets: Tensor, coming: int) -> Tensor:
    """Targets that leave place for the tokens that are coming."""
    return (targets - coming).clamp_min(policy.smallest - 1) if coming else targets
