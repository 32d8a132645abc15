"""A picture explained by maps over its pixels: all that there is where nothing attends, and Grad-CAM on any stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from manyheads.explain.attributions import LayerwiseRelevance, MapGradCAM, salient_relevance


class Stage(NamedTuple):
    """A part whose map Grad-CAM can be taken on; grid: of a part that gives its cells in reading order."""

    path: str
    channels_last: bool = False
    grid: tuple[int, int] | None = None


def stages_of(model: Any) -> list[Stage]:
    """Of a hierarchy of this package its stages, of its other image models their layers, of transformers' ResNet,
    ConvNeXt and their like the encoder's stages. ValueError for a model that has none of these."""
    if getattr(model, "hierarchy", None) is not None:
        return [Stage(f"hierarchy.stages.{i}", True) for i in range(len(model.hierarchy.stages))]
    if own_patches(model):
        grid = tuple(model.config.patch_grid)
        return [Stage(f"stack.layers.{i}", True, grid) for i in range(len(model.stack.layers))]
    for path, module in model.named_modules():
        if path.endswith("encoder.stages"):
            return [Stage(f"{path}.{i}") for i, _ in enumerate(module.children())]
    raise ValueError(
        f"{type(model).__name__} has no stages that give maps: want a model with `stages` or patches of this package, "
        "or a convolutional one of transformers such as ResNet or ConvNeXt"
    )


def own_patches(model: Any) -> bool:
    """Whether it is a model of this package whose patches stand in one grid."""
    return getattr(model, "embed_patches", None) is not None and hasattr(model, "stack")


def on_grids(model: Any) -> bool:
    """Whether layers of such a model see the grid itself, of which there are no rows of tokens to show."""
    return own_patches(model) and any(layer.self_attn.grid is not None for layer in model.stack.layers)


def cam(model: nn.Module, inputs: Any, target: int, *, stage: int | None = None, guided: bool = False) -> Tensor:
    """Grad-CAM [b, rows, columns] of a stage, by default the last map of all; guided: [b, height, width], the size of
    what guided backpropagation has at each pixel. ValueError, naming it, for a stage that there is not."""
    place: dict[str, Any] = {}
    if stage is not None or own_patches(model) or getattr(model, "hierarchy", None) is not None:
        known = stages_of(model)
        if stage is not None and not 0 <= stage < len(known):
            raise ValueError(f"stage {stage}: {type(model).__name__} has stages 0 to {len(known) - 1}")
        chosen = known[-1 if stage is None else stage]
        place = {"part": chosen.path, "channels_last": chosen.channels_last, "grid": chosen.grid}
    found = _only(MapGradCAM(model, guided=guided, **place).attribute(inputs, target))
    return found.sum(1).abs() if guided else found


def _relevance(model: nn.Module, inputs: Any, target: int) -> Tensor:
    return _only(LayerwiseRelevance(model).attribute(inputs, target))


def _salient(model: nn.Module, inputs: Any, target: int) -> Tensor:
    return salient_relevance(_relevance(model, inputs, target))


def _only(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


CAMS: dict[str, Callable[..., Tensor]] = {"grad-cam": cam, "guided-grad-cam": partial(cam, guided=True)}
PICTURES: dict[str, Callable[..., Tensor]] = {
    **CAMS,
    "layerwise-relevance": _relevance,
    "salient-relevance": _salient,
}


def maps_over(
    model: nn.Module, inputs: Any, target: int | None, names: Sequence[str] | None, stage: int | None = None
) -> dict[str, Tensor]:
    """Name -> [rows, columns], for a batch of one picture; by default all that the model can have, which is Grad-CAM at
    least. stage: what Grad-CAM is taken on, and nothing else then. ValueError for a name that is none of these, and
    where there is no target to explain."""
    known = PICTURES if stage is None else CAMS
    unknown = [name for name in names or () if name not in known]
    if unknown:
        which = "which a model without attention can have" if stage is None else "which can be had of a stage"
        raise ValueError(f"--method {unknown[0]!r} is none of {', '.join(known)}, {which}")
    if target is None:
        raise ValueError(f"{type(model).__name__} gives no class to explain, so that there is no Grad-CAM")
    place = {} if stage is None else {"stage": stage}
    found = {}
    for name in names or known:
        try:
            found[name] = known[name](model, inputs, target, **place)[0]
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
