"""MoA: every head its own span, which grows with the text at a rate of its own; and the plan of the spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policies.streaming import recency
from manyheads.shrink.policy import Policy

Rule = tuple[float, float]


@dataclass(kw_only=True)
class MoA(Policy):
    """Claim: heads differ in how far they look and in how that grows with the text: give each its own elastic span.

    span_h(N) = alpha_h + beta_h N of N tokens, at least 1, and at most all: a head keeps its first sink_size tokens and
    the latest span_h(N). rules: a table [layers][KV heads] of (alpha, beta), or rule: one for all. plan_spans makes a
    table from what every span costs.
    Source: arXiv 2406.14909, thu-nics/MoA. There spans are counted in blocks of 64 and prefill is sparse too; here they
    are counted in tokens, and a pass sees what it was given before its entries leave.
    """

    rules: Sequence[Sequence[Rule]] | None = None
    rule: Rule | None = None
    sink_size: int = 64

    def __post_init__(self) -> None:
        if (self.rules is None) == (self.rule is None):
            raise ValueError("MoA: give rules, a table [layers][KV heads] of (alpha, beta), or one rule for all heads")
        if not isinstance(self.sink_size, int) or self.sink_size < 0:
            raise ValueError(f"MoA: sink_size must be a whole number of at least 0; got {self.sink_size!r}")
        budgets = ("compression_ratio", "budget_tokens", "budget_bytes", "allocation")
        given = [key for key in budgets if getattr(self, key) is not None]
        if given:
            raise ValueError(f"MoA: its rules are the budget; leave {', '.join(given)} out, or plan_spans(density=...)")
        for row in self.rules if self.rules is not None else [[self.rule]]:
            for own in row:
                _check_rule(own)
        if self.rules is not None and (not len(self.rules) or len({len(row) for row in self.rules}) != 1):
            raise ValueError("MoA: rules must be a table [layers][KV heads] with rows of one length")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    @property
    def is_full(self) -> bool:
        return False

    def score(self, view: View) -> Tensor:
        return recency(view, self.sink_size)

    def mean_target(self, layer: Any, view: View) -> Tensor:
        return view.count.cpu().double()

    def targets(self, mean: Tensor, layer: Any, heads: int) -> Tensor:
        if self.rules is not None and (len(self.rules), len(self.rules[0])) != (layer.layers, heads):
            raise ValueError(
                f"MoA: rules are for ({len(self.rules)}, {len(self.rules[0])}) (layers, KV heads), the model has "
                f"({layer.layers}, {heads}); use a plan of this model"
            )
        own = self.rules[layer.index] if self.rules is not None else [self.rule] * heads
        spans = torch.tensor([list(rule) for rule in own if rule is not None], dtype=torch.float64)
        span = (spans[:, 0] + spans[:, 1] * mean[:, None] + 1e-9).floor()
        return self.sink_size + span.clamp_min(1).long()

    def room(self, layer: Any) -> int | None:
        return None


def _check_rule(rule: Any) -> None:
    """Spans that grow faster than the text, shrink, or never are."""
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not all(math.isfinite(number) for number in rule):
        raise ValueError(f"MoA: a rule is a pair of numbers, (alpha, beta); got {rule!r}")
    alpha, beta = rule
    if not 0 <= beta <= 1 or (alpha <= 0 and beta == 0):
        raise ValueError(
            f"MoA: the span {alpha} + {beta} N must be positive for long texts and grow no faster than they do: "
            "beta from 0 to 1, and alpha above 0 where beta is 0"
        )


def plan_spans(
    losses: Any,
    configs: Sequence[Rule],
    lengths: Sequence[int],
    density: float | Sequence[float],
    *,
    sink_size: int = 64,
    kv_heads: int | None = None,
    distinct: int | None = None,
    weights: Sequence[float] | None = None,
    seconds: float = 60.0,
) -> list[list[Rule]]:
    """The rules [layers][KV heads] of least loss whose cache stays within a density at every length.

    losses[layers][heads][configs][lengths]: what a head costs with configs[c] at lengths[j]; density: the share of all
    entries that may be held (one, or one for each length). A mixed-integer programme: one config for each head, the sum
    of weighted losses least; distinct: at most so many different rules in a layer. kv_heads: query heads of one KV head
    are added up. Source: arXiv 2406.14909, which keeps a Pareto front over the lengths and picks on held-out text; here
    the lengths have weights.
    """
    table = _loss_table(losses, len(configs), len(lengths), kv_heads)
    for rule in configs:
        _check_rule(rule)
    held = _held(configs, lengths, sink_size)
    limits = [float(density)] * len(lengths) if isinstance(density, (int, float)) else [float(own) for own in density]
    if len(limits) != len(lengths) or not all(0 < own <= 1 for own in limits):
        raise ValueError(f"plan_spans: density is a share above 0, at most 1, one for each length; got {density}")
    each = [1.0] * len(lengths) if weights is None else [float(own) for own in weights]
    if len(each) != len(lengths) or min(each) < 0 or not sum(each):
        raise ValueError(f"plan_spans: weights are one number of at least 0 for each length; got {weights}")
    if distinct is not None and distinct < 1:
        raise ValueError(f"plan_spans: distinct is the number of rules in a layer, at least 1; got {distinct}")
    least = held.amin(0)
    if bool((least > torch.tensor(limits, dtype=torch.float64) + 1e-12).any()):
        raise ValueError(
            f"plan_spans: no plan is within {density}: the shortest spans hold "
            f"{', '.join(f'{float(own):.3g} at {n}' for own, n in zip(least, lengths, strict=True))}; "
            "raise density, or give shorter spans"
        )
    cost = (table * torch.tensor(each, dtype=torch.float64)).sum(-1)
    picked = _solve(cost, held, limits, distinct, seconds)
    return [[(float(configs[c][0]), float(configs[c][1])) for c in row] for row in picked]


def _loss_table(losses: Any, configs: int, lengths: int, kv_heads: int | None) -> Tensor:
    table = torch.as_tensor(losses, dtype=torch.float64)
    if table.dim() != 4 or tuple(table.shape[2:]) != (configs, lengths) or not table.numel():
        raise ValueError(
            f"plan_spans: losses must be [layers, heads, {configs} configs, {lengths} lengths]; got "
            f"{tuple(table.shape)}"
        )
    if not bool(table.isfinite().all()):
        raise ValueError("plan_spans: losses hold numbers that are not finite; measure the influence again")
    if kv_heads is None:
        return table
    if kv_heads < 1 or table.shape[1] % kv_heads:
        raise ValueError(f"plan_spans: {table.shape[1]} heads are not shared out among {kv_heads} KV heads")
    return table.unflatten(1, (kv_heads, -1)).sum(2)


def _held(configs: Sequence[Rule], lengths: Sequence[int], sink_size: int) -> Tensor:
    """[configs, lengths]: the share of its tokens that a head holds."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"plan_spans: lengths are whole numbers of at least 1; got {list(lengths)}")
    rules, n = torch.tensor([list(rule) for rule in configs], dtype=torch.float64), torch.tensor(lengths).double()
    span = (rules[:, :1] + rules[:, 1:] * n + 1e-9).floor().clamp_min(1)
    return torch.minimum(span + sink_size, n) / n


def _solve(cost: Tensor, held: Tensor, limits: list[float], distinct: int | None, seconds: float) -> list[list[int]]:
    """cost [layers, heads, configs], held [configs, lengths] -> the config of each head."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, hstack, kron

    layers, heads, configs = cost.shape
    own = layers * heads
    used = layers * configs if distinct is not None else 0

    def padded(rows: Any) -> Any:
        return hstack([rows, csr_array((rows.shape[0], used))]).tocsr() if used else rows

    # One config for each head; the mean of what they hold, within each length's limit.
    one = kron(eye_array(own), csr_array(np.ones((1, configs)))).tocsr()
    share = csr_array(np.tile(held.T.numpy(), (1, own)) / own)
    rules = [LinearConstraint(padded(one), 1, 1), LinearConstraint(padded(share), -np.inf, np.array(limits) + 1e-12)]
    if distinct is not None:
        # A config that a head of the layer has is used there, and only so many are.
        by_layer = kron(kron(eye_array(layers), csr_array(np.ones((heads, 1)))), eye_array(configs))
        rules.append(LinearConstraint(hstack([eye_array(own * configs), -by_layer]).tocsr(), -np.inf, 0))
        many = kron(eye_array(layers), csr_array(np.ones((1, configs))))
        empty = csr_array((layers, own * configs))
        rules.append(LinearConstraint(hstack([empty, many]).tocsr(), -np.inf, distinct))
    # Influences may be tiny, and the solver's tolerances are absolute.
    goal = np.concatenate([(cost / cost.abs().max().clamp_min(1e-300)).flatten().numpy(), np.zeros(used)])
    found = milp(
        goal,
        integrality=np.ones(len(goal)),
        bounds=Bounds(0, 1),
        constraints=rules,
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise ValueError(f"plan_spans: no plan was found: {found.message}; raise density or seconds, or drop distinct")
    return found.x[: own * configs].reshape(layers, heads, configs).argmax(-1).tolist()
