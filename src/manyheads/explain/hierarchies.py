"""Attention of models whose layers stand on grids of several sizes: windows put back in place, maps of small grids
shown at the size of the largest.

Two kinds are known: transformers' models whose layers partition their cells into windows that may be shifted (Swin and
what is built of its layers), and models of this package with `stages`. h heads, n cells of a layer in reading order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.grid_windows import Windows, whole_weights
from manyheads.hosts.sites import choose, sites
from manyheads.hosts.taps import tap

if TYPE_CHECKING:
    from manyheads.explain.views import View

MOST_WEIGHTS = 1 << 26  # of a layer that is opened whole: 256 MB


@dataclass(frozen=True)
class GridLayer:
    """weights: [h, n, n] over rows x columns cells, or None with the reason why there are none."""

    layer: int
    name: str
    rows: int
    columns: int
    weights: Tensor | None
    why: str = ""

    def told(self) -> dict[str, Any]:
        """For a report."""
        how = {"left_out": self.why} if self.weights is None else {"heads": self.weights.shape[0]}
        return {"layer": self.layer, "name": self.name, "rows": self.rows, "columns": self.columns, **how}


def is_hierarchy(model: nn.Module) -> bool:
    """Whether `grid_layers` knows the model."""
    return _is_staged(model) or _is_windowed(model)


def _is_staged(model: nn.Module) -> bool:
    return getattr(model, "hierarchy", None) is not None


def _is_windowed(model: nn.Module) -> bool:
    try:
        return all(_partitions(_parent(model, site.path)) for site in sites(model))
    except ValueError:
        return False


def _partitions(module: nn.Module) -> bool:
    own = all(hasattr(module, name) for name in ("window_size", "shift_size"))
    return own and "input_dimensions" in inspect.signature(module.forward).parameters


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def grid_layers(model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[int] | None = None) -> list[GridLayer]:
    """Of one picture, in the order of the layers: who attends to whom on each layer's grid.

    Weights that a layer of windows gives to the padding around a grid are left out, so that a row may sum to less than
    one. ValueError where layers are asked for that there are not, or none has weights.
    """
    found = list(_of_stages(model, inputs, layers) if _is_staged(model) else _of_windows(model, inputs, layers))
    if all(own.weights is None for own in found):
        why = "; ".join(dict.fromkeys(f"{own.name}: {own.why}" for own in found))
        raise ValueError(f"{type(model).__name__} has no attention weights to show: {why}")
    return found


def _of_windows(model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[int] | None) -> Iterator[GridLayer]:
    sizes: dict[int, tuple[int, int]] = {}
    found: list[GridLayer] = []

    def sized(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        rows, columns = bound.arguments["input_dimensions"]
        sizes[id(module)] = int(rows), int(columns)

    def reader(call: Any) -> None:
        parent: Any = _parent(model, call.site.path)
        (rows, columns), n = sizes[id(parent)], sizes[id(parent)][0] * sizes[id(parent)][1]
        why = _too_many(call.heads, n)
        inner = None if why else call.weights()
        weights = None
        if inner is not None:
            cells = window_cells(rows, columns, int(parent.window_size), int(parent.shift_size))
            weights = whole_weights(inner.transpose(0, 1)[None], Windows(cells, cells), n, n)[0]
        found.append(GridLayer(call.layer, call.site.path, rows, columns, weights, why))

    with ExitStack() as stack:
        for site in choose(model, layers):
            hook = _parent(model, site.path).register_forward_pre_hook(sized, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(tap(model, reader, layers=layers))
        model(**inputs)
    return iter(found)


def window_cells(rows: int, columns: int, window: int, shift: int) -> Tensor:
    """[windows, window^2]: which cell of the grid stands at each place of each window, -1 for padding, as Swin cuts
    them: padded below and on the right to whole windows, then rolled up and left by the shift."""
    cells = torch.arange(rows * columns).view(rows, columns)
    cells = F.pad(cells, (0, -columns % window, 0, -rows % window), value=-1)
    cells = cells.roll((-shift, -shift), (0, 1))
    return cells.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)


def _of_stages(model: Any, inputs: dict[str, Tensor], layers: Sequence[int] | None) -> Iterator[GridLayer]:
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    blocks = [(stage, block) for stage, own in enumerate(model.hierarchy.stages) for block in own.blocks]
    missing = set(layers or ()) - set(range(len(blocks)))
    if missing:
        raise ValueError(f"the model has layers 0 to {len(blocks) - 1}; got {sorted(missing)}")
    for number, ((stage, block), weights) in enumerate(zip(blocks, output.attentions, strict=True)):
        if layers is not None and number not in layers:
            continue
        rows, columns = output.hidden_states[stage].shape[1:3]
        why = "has no weights from cell to cell" if weights is None else ""
        if weights is not None:
            why = _too_many(weights.shape[1], rows * columns)
            why = why or (
                "attends over other cells than it gives" if weights.shape[2:] != (rows * columns,) * 2 else ""
            )
        own = None if why else weights[0]
        mixer = "no mixer" if block.mechanism is None else block.mechanism.card.name
        yield GridLayer(number, f"stage {stage}, {mixer}", rows, columns, own, why)


def _too_many(heads: int, n: int) -> str:
    return f"{heads} heads over {n:,} cells are too many weights to open" if heads * n * n > MOST_WEIGHTS else ""


def upsampled(values: Tensor, rows: int, columns: int, *, shares: bool = False) -> Tensor:
    """[..., r, c] -> [..., rows, columns]: each cell's value at the cells that were merged into it; shares: divided
    evenly among these, so that the sum stays."""
    for axis, size in ((-2, rows), (-1, columns)):
        few = values.shape[axis]
        step = -(-size // few)
        place = (torch.arange(size, device=values.device) // step).clamp(max=few - 1)
        if shares:
            count = torch.bincount(place, minlength=few).clamp(min=1).to(values)
            values = values / (count[:, None] if axis == -2 else count)
        values = values.index_select(axis, place)
    return values


def rollout(found: Sequence[GridLayer]) -> Tensor:
    """[rows, columns] of the first layer's grid: what the mean over the last grid has of each cell, where every layer
    is half its attention (the heads' mean, rows summing to one) and half the cell itself, and a cell of a small grid
    has as much of each cell that was merged into it. Layers without weights count as the cell itself.

    Source: attention rollout, arXiv:2005.00928; over merged cells our own.
    """
    last = found[-1]
    mass = torch.full((last.rows, last.columns), 1.0 / (last.rows * last.columns))
    for own in reversed(found):
        if mass.shape != (own.rows, own.columns):
            mass = upsampled(mass, own.rows, own.columns, shares=True)
        if own.weights is not None:
            mean = own.weights.float().mean(0)
            mean = mean / mean.sum(-1, keepdim=True).clamp(min=1e-30)
            mass = 0.5 * mass + 0.5 * (mass.flatten() @ mean).view(mass.shape)
    return mass


def maps_of_layers(found: Sequence[GridLayer]) -> dict[str, Tensor]:
    """Name -> [rows, columns] at the size of the largest grid: the rollout; and of each layer with weights what its
    cells get of all others (the heads' mean), and where the cell in the middle looks."""
    rows, columns = max(own.rows for own in found), max(own.columns for own in found)
    maps = {"rollout": upsampled(rollout(found), rows, columns)}
    for own in found:
        if own.weights is None:
            continue
        mean, middle = own.weights.float().mean(0), (own.rows // 2) * own.columns + own.columns // 2
        where = f"layer {own.layer} ({own.rows} x {own.columns})"
        for name, values in (("seen", mean.mean(0)), ("from the middle", mean[middle])):
            maps[f"{where}: {name}"] = upsampled(values.view(own.rows, own.columns), rows, columns)
    return maps


def views_of(
    model: nn.Module,
    inputs: dict[str, Tensor],
    image: Any,
    methods: Sequence[str] | None,
    layers: Sequence[int] | None,
    page_mb: float,
    target: int | None = None,
) -> tuple[list[View], list[dict[str, Any]], dict[str, Any]]:
    """The maps over the image, then the heads of the layers of each size; what each layer is; and the maps. Of a model
    of this package Grad-CAM is one of them, where there is a target. ValueError where another method is asked for."""
    from manyheads.explain.pictures import CAMS, maps_over
    from manyheads.explain.views import AttentionStore, Panel, view_heads, view_image

    cams = list(CAMS) if _is_staged(model) else []
    others = [name for name in methods or () if name not in ("rollout", *cams)]
    if others:
        there = "rollout alone" if not cams else ", ".join(["rollout", *cams])
        raise ValueError(
            f"--method {others[0]}: of {type(model).__name__}, with grids of several sizes, there is {there}, and what "
            "each layer sees"
        )
    found = grid_layers(model, inputs, layers)
    maps = {name: own.float().numpy() for name, own in maps_of_layers(found).items()}
    wanted = [name for name in (methods or cams[:1]) if name in cams]
    if wanted and (methods or target is not None):
        maps |= {name: own.float().numpy() for name, own in maps_over(model, inputs, target, wanted).items()}
    views = [view_image(image, maps, title="What layers see")]
    alike: dict[tuple[int, int, int], list[GridLayer]] = {}
    for own in found:
        if own.weights is not None:
            alike.setdefault((own.rows, own.columns, own.weights.shape[0]), []).append(own)
    for (rows, columns, _), together in alike.items():
        kept = [own.weights for own in together]
        store = AttentionStore.from_attention(kept, budget_mb=page_mb / len(alike))
        store = replace(store, layers=tuple(own.layer for own in together))  # by the model's numbers
        tokens = [f"{row}.{column}" for row in range(rows) for column in range(columns)]
        numbers = ", ".join(str(own.layer) for own in together)
        views.append(view_heads(Panel(store, tokens), title=f"{rows} x {columns}: layers {numbers}"))
    return views, [own.told() for own in found], maps
