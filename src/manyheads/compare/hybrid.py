"""Several mechanisms as one contestant: which layer holds which, what is common to all, and costs of a mean layer.

`based,based,softmax`: the layers of a model from below, again from the first where the model has more of them. What is
measured of a mechanism by itself (time, memory, decoding) is measured of each and averaged over the layers, so that it
stands beside the one layer of the others; what a trained model holds is summed over its layers, for all alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from manyheads.card import Pattern
from manyheads.registry import mechanism_class

Spec = Mapping[str, Any]

# What of an outcome is a size or a time of one layer; the rest says how it was measured.
_AVERAGED = ("forward_s", "forward_backward_s", "seconds_per_token")
_COUNTED = ("forward_flops", "forward_peak_bytes", "peak_bytes", "state_bytes", "allocated_bytes")


def layers_of(mechanism: Spec) -> list[Spec]:
    """Of a cell's mechanism: {"name", "args"} each, one where it is no hybrid."""
    return list(mechanism["layers"]) if "layers" in mechanism else [mechanism]


def specs_of(mechanism: Spec) -> list[dict[str, Any]]:
    """The same as a model's configuration has them: a name and arguments beside it."""
    return [{"name": layer["name"], **layer["args"]} for layer in layers_of(mechanism)]


def names_of(mechanism: Spec) -> list[str]:
    return [layer["name"] for layer in layers_of(mechanism)]


def common_patterns(names: Sequence[str]) -> frozenset[Pattern]:
    """The patterns that every one declares. Raises ValueError where there is none: no model has a place for them."""
    declared = {name: mechanism_class(name).card.patterns for name in names}
    common = reduce(frozenset.__and__, map(frozenset, declared.values()))
    if not common:
        each = "; ".join(f"{name} declares {', '.join(sorted(patterns))}" for name, patterns in declared.items())
        raise ValueError(
            f"no pattern is common to the layers {','.join(names)}: {each}; want mechanisms that share one"
        )
    return common


def deepened(specs: Sequence[Any], depth: int) -> list[Any]:
    """The specs again and again, one per layer. Raises ValueError where they do not come out even."""
    if depth % len(specs):
        names = ",".join(spec["name"] for spec in specs)
        raise ValueError(
            f"{names} is of {len(specs)} layers and the model of {depth}; want a multiple, such as {len(specs)}"
        )
    return list(specs) * (depth // len(specs))


def of_a_layer(measure: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """`measure`, of a hybrid as the mean over its layers, each measured by itself, and once where it stands twice."""

    def measured(settings: Mapping[str, Any]) -> dict[str, Any]:
        counts = Counter(json.dumps(layer, sort_keys=True) for layer in layers_of(settings["mechanism"]))
        if len(counts) == 1:
            return measure({**settings, "mechanism": json.loads(next(iter(counts)))})
        outcomes = []
        for text, count in counts.items():
            layer = json.loads(text)
            outcome = measure({**settings, "mechanism": layer})
            if outcome.get("status", "done") != "done":
                return outcome | {"error": f"layer {layer['name']}: {outcome.get('error', '')}"}
            outcomes.append((outcome, count))
        return _mean(outcomes)

    return measured


def _mean(outcomes: Sequence[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    total = sum(count for _, count in outcomes)
    mean = dict(outcomes[0][0])
    for key in (*_AVERAGED, *_COUNTED):
        known = [outcome[key] * count for outcome, count in outcomes if outcome.get(key) is not None]
        if key in mean:
            whole = sum(known) / total if len(known) == len(outcomes) else None
            mean[key] = round(whole) if whole is not None and key in _COUNTED else whole
    stops = [outcome["stop"] for outcome, _ in outcomes if "stop" in outcome]
    return mean | ({"stop": stops[0]} if stops else {})
