"""CriticalKV: what an entry writes into the model counts as well as how much it is looked at."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.shrink.compress import View
from manyheads.shrink.policies.based import Based
from manyheads.shrink.textorder import wide

# What families call the map from head outputs to the model.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(kw_only=True)
class CriticalKV(Based):
    """Claim: an entry's part in the output is bounded by its weight times the size of its projected value.

    In each head the base's best first_stage_ratio of the budget stay; the others compete by
    (base score + epsilon) * mean over query heads of ||W_O v_t||_1, [b, g, m].
    Source: arXiv 2502.03805, NVIDIA/kvpress `criticalkv_press.py`. W_O is what the output map does to each head's
    values, adapters included and its bias left out. With allocation=AdaKV() heads share the budget by these scores, of
    which the first stage is sure of its part (kvpress' CriticalAdaKV shares by the base's). ExpectedAttention as the
    base: use_vnorm=False, else values count twice.
    """

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"CriticalKV: epsilon is added to scores, at least 0; got {self.epsilon!r}")
        if not 0 <= self.first_stage_ratio <= 1:
            raise ValueError(
                f"CriticalKV: first_stage_ratio is a share of the budget, 0 to 1; got {self.first_stage_ratio!r}"
            )
        super().__post_init__()

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Norms are kept beside the entries where decoding asks for them at every token."""
        return super().notes + (() if self.is_full or not self.acts(decoding=True) else ("projected",))

    def prepare(self, model: Any, cache: Any) -> None:
        super().prepare(model, cache)
        if not self.is_full:
            cache.shared["outputs"] = [weakref.ref(own) for own in output_maps(model, cache.depth)]

    def observe(self, view: View) -> None:
        super().observe(view)
        if "projected" in self.notes:
            new = min(view.group.length, sum(done.queries.shape[3] for done in view.passes))
            start = view.group.length - new
            view.note("projected").narrow(2, start, new).copy_(self._norms(view, view.values.narrow(2, start, new)))

    def score(self, view: View) -> Tensor:
        assert view.targets is not None
        first = wide(self._scorer.score(view))
        norms = view.note("projected") if "projected" in self.notes else self._norms(view, view.values)
        # A score of minus infinity or of infinity is a rule, not a weight.
        second = torch.where(first.isfinite(), (first + self.epsilon) * norms.to(first), first)
        sure = (view.targets * self.first_stage_ratio).long()
        if self.first_stage_ratio:
            sure = sure.clamp_min(1)
        ranks = first.masked_fill(~view.alive, -torch.inf).argsort(-1, descending=True).argsort(-1)
        return second.masked_fill(ranks < sure[..., None], torch.inf)

    def _norms(self, view: View, values: Tensor) -> Tensor:
        """[b, g, n] of values [b, g, n, dv], float32 at least."""
        output = view.shared["outputs"][view.layer]()
        repeat = view.passes[-1].queries.shape[2]
        found = [projected(output, values[:, i], head * repeat, repeat) for i, head in enumerate(view.group.heads)]
        return torch.stack(found, 1)


def output_maps(model: Any, depth: int) -> list[nn.Module]:
    """The map from head outputs to the model, of each layer; a ValueError where it is not found."""
    from manyheads.hosts.sites import choose, only_stack

    layers = [site.module for site in choose(model, None, only_stack(model), "self")]
    found = [next((getattr(own, name) for name in _OUTPUTS if hasattr(own, name)), None) for own in layers]
    maps = [own for own in found if isinstance(own, nn.Module)]
    if len(maps) != depth:
        raise ValueError(
            f"CriticalKV needs the output projection of each attention layer, and finds none called "
            f"{', '.join(_OUTPUTS)} in {type(model).__name__}; use the base alone"
        )
    return maps


def projected(output: nn.Module, values: Tensor, first: int, repeat: int) -> Tensor:
    """Mean over query heads first .. first + repeat - 1 of ||W_O v||_1, [b, n] of one KV head's values [b, n, dv].

    The map is called as a module, on values or on unit vectors, whichever are fewer: so adapters around it count."""
    b, n, dv = values.shape
    total: Any = 0
    few = b * n <= dv
    rows = values.flatten(0, 1) if few else torch.eye(dv, dtype=values.dtype, device=values.device)
    width = _width(output)
    for head in range(first, first + repeat):
        given = rows.new_zeros(len(rows) + 1, width)
        given[:-1, head * dv : (head + 1) * dv] = rows
        made = output(given)
        made = made[:-1] - made[-1:]
        total = total + wide(made if few else values.flatten(0, 1) @ made).abs().sum(-1)
    return (total / repeat).view(b, n)


def _width(output: Any) -> int:
    """Features that go in: a Linear's, or a Conv1D's, whose weight lies the other way."""
    known = getattr(output, "in_features", None) or getattr(output, "nx", None)
    return int(known if known is not None else output.weight.shape[-1])
