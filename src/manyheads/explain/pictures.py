"""A picture explained where nothing attends: maps over the pixels of a convolutional model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from manyheads.explain.attributions import LayerwiseRelevance, MapGradCAM, salient_relevance


def _cam(model: nn.Module, inputs: Any, target: int) -> Tensor:
    return _only(MapGradCAM(model).attribute(inputs, target))


def _guided(model: nn.Module, inputs: Any, target: int) -> Tensor:
    return _only(MapGradCAM(model, guided=True).attribute(inputs, target)).sum(1).abs()


def _relevance(model: nn.Module, inputs: Any, target: int) -> Tensor:
    return _only(LayerwiseRelevance(model).attribute(inputs, target))


def _salient(model: nn.Module, inputs: Any, target: int) -> Tensor:
    return salient_relevance(_relevance(model, inputs, target))


def _only(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


PICTURES: dict[str, Callable[[nn.Module, Any, int], Tensor]] = {
    "grad-cam": _cam,
    "guided-grad-cam": _guided,
    "layerwise-relevance": _relevance,
    "salient-relevance": _salient,
}


def maps_over(model: nn.Module, inputs: Any, target: int | None, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Name -> [rows, columns], for a batch of one picture; by default all that the model can have, which is Grad-CAM at
    least. ValueError for a name that is none of these, and where there is no target to explain."""
    unknown = [name for name in names or () if name not in PICTURES]
    if unknown:
        raise ValueError(
            f"--method {unknown[0]!r} is none of {', '.join(PICTURES)}, which a model without attention can have"
        )
    if target is None:
        raise ValueError(f"{type(model).__name__} gives no class to explain, and attends nowhere")
    found = {}
    for name in names or PICTURES:
        try:
            found[name] = PICTURES[name](model, inputs, target)[0]
        except ValueError:
            if names or name == "grad-cam":
                raise
    return found


def attends(model: nn.Module) -> bool:
    from manyheads.hosts.sites import sites

    try:
        return bool(sites(model))
    except ValueError:
        return False
