"""Grad-CAM on feature maps of convolutions (Selvaraju et al. 2017, arXiv 1610.02391), and guided by backpropagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manyheads.explain.attributions.base import BROKEN, Attributed, Attribution
from manyheads.explain.attributions.feed import Feed, Position, Score, Target, logits_of, score_of


class MapGradCAM(Attribution):
    """relu(sum_k alpha_k A_k), alpha_k = mean over cells of dy/dA_k, on the feature maps A [b, k, rows, columns] of one
    part of a convolutional model; y is the target's logit, before any softmax.

    part: its path in the model ("resnet.encoder.stages.2"); by default the last one that gives a map of more than one
    cell. channels_last: maps are [b, rows, columns, k]. grid: the rows and columns of a part that gives its cells in
    reading order, [b, rows columns, k]. guided: times guided backpropagation (arXiv 1412.6806: at every
    ReLU only positive gradients go on, and only where the input was positive), which a model without a ReLU does not
    have. Of a part that runs several times, the last run. Shapes: [b, rows, columns], not negative; guided: [b,
    channels, height, width], as the pixels.

    Where the map is followed by its mean and a linear layer, alpha is that layer's row over the number of cells: CAM.
    """

    of_target = True

    def __init__(
        self,
        model: nn.Module,
        *,
        part: str | None = None,
        guided: bool = False,
        channels_last: bool = False,
        grid: Sequence[int] | None = None,
        score: Score | None = None,
    ):
        super().__init__(model, score=score)
        if part is not None and part not in dict(model.named_modules()):
            near = [name for name, _ in model.named_children()]
            raise ValueError(f"part={part!r} is no part of {type(model).__name__}; at its top are {near}")
        if grid is not None and part is None:
            raise ValueError(f"grid={list(grid)} without a part: say which part gives cells in reading order")
        self.part, self.guided, self.channels_last = part, guided, channels_last or grid is not None
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        if position is not None:
            raise ValueError("position= means nothing for a picture's class: leave it out")
        pixels = pixels_of(feed)
        part = last_map(feed) if self.part is None else self.part
        found = self._cam(feed, target, pixels, part)
        if not self.guided:
            return found
        slopes = _guided(feed, target, pixels, self.score)
        wide = F.interpolate(found[:, None], tuple(pixels.shape[2:]), mode="bilinear", align_corners=False)
        return slopes * wide.to(slopes.dtype)

    def _cam(self, feed: Feed, target: Target, pixels: Tensor, part: str) -> Tensor:
        with torch.enable_grad(), _maps_of(feed.model, part, self.grid) as seen:
            score = picture_score(feed, target, pixels.detach().requires_grad_(), self.score)
            if not seen:
                raise ValueError(f"{part} gave no map [b, k, rows, columns] in this pass")
            kept = seen[-1]
            (slope,) = torch.autograd.grad(score.sum(), kept, allow_unused=True)
        values = kept.detach()
        slope = torch.zeros_like(values) if slope is None else slope
        if self.grid is not None:
            values, slope = values.unflatten(1, self.grid), slope.unflatten(1, self.grid)
        if self.channels_last:
            values, slope = values.movedim(-1, 1), slope.movedim(-1, 1)
        cam = torch.einsum("bkrc,bk->brc", values, slope.mean((2, 3))).clamp_min(0)
        if not bool(cam.isfinite().all()):
            raise ValueError(f"the maps of {part} hold NaN or infinity: {BROKEN}")
        return cam


def pixels_of(feed: Feed) -> Tensor:
    pixels: Tensor = feed.named[feed.main]
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(f"{feed.main} is {pixels.dtype} {list(pixels.shape)}: want pixels [b, colours, height, width]")
    return pixels


def picture_score(feed: Feed, target: Target, pixels: Tensor, score: Score | None) -> Tensor:
    output = feed(**{feed.main: pixels})
    logits = logits_of(output)
    if score is None and logits is not None and logits.dim() == 3:
        raise ValueError(
            f"{type(feed.model).__name__} gives logits {list(logits.shape)}, of many places, none of them its answer: "
            "give score=, a function of the output with one number per row (say one query's class)"
        )
    found = score_of(output, feed, target, None, score)
    if not bool(found.isfinite().all()):
        raise ValueError(f"the score holds NaN or infinity: {BROKEN}")
    return found


def _map_in(output: Any, grid: tuple[int, int] | None) -> Tensor | None:
    """The map among what a part gives: itself, or the last hidden state of an output, or the first of a tuple; with a
    grid, its cells."""
    own = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if own is None and isinstance(output, tuple | list) and output:
        own = output[0]
    if not isinstance(own, Tensor) or not own.is_floating_point():
        return None
    fits = own.dim() == 4 if grid is None else own.dim() == 3 and own.shape[1] == grid[0] * grid[1]
    return own if fits else None


def last_map(feed: Feed) -> str:
    """The path of the last part whose output is a map [b, k, rows, columns] of more than one cell."""
    seen: list[str] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path and isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
                seen.append(path)

        return hook

    hooks = [module.register_forward_hook(watch(path)) for path, module in feed.model.named_modules()]
    try:
        with torch.no_grad():
            feed()
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(
            f"{type(feed.model).__name__} has no part that gives maps [b, k, rows, columns] of more than one cell: use "
            "grad-cam, which reads tokens"
        )
    return seen[-1]


@contextmanager
def _maps_of(model: nn.Module, part: str, grid: tuple[int, int] | None) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        found = _map_in(output, grid)
        if found is None:
            return None
        if isinstance(output, Tensor):
            seen.append(output.clone())
            return seen[-1].clone()  # what comes behind may write into it
        seen.append(found)
        return None

    handle = model.get_submodule(part).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        positive: Tensor = ctx.saved_tensors[0]
        return slope.clamp_min(0) * positive


_RELUS = {F.relu, torch.relu, Tensor.relu}
_RELUS_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}


class _Guide(TorchFunctionMode):
    """Every ReLU in a pass, module or function, with the guided backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RELUS and func not in _RELUS_IN_PLACE:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        inplace = func in _RELUS_IN_PLACE or kwargs.get("inplace", len(args) > 1 and args[1])
        guided = _GuidedReLU.apply(x)
        return x.copy_(guided) if inplace else guided


def _guided(feed: Feed, target: Target, pixels: Tensor, score: Score | None) -> Tensor:
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad(), _Guide() as guide:
        found = picture_score(feed, target, pixels, score)
    if not guide.count:
        raise ValueError(
            f"{type(feed.model).__name__} has no ReLU, which guided backpropagation is defined by: leave guided out"
        )
    (slopes,) = torch.autograd.grad(found.sum(), pixels)
    return slopes
