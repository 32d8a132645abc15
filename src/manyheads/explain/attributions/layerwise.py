"""Layer-wise relevance propagation through convolutional models, and the saliency of its map (arXiv 1712.08268)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manyheads.explain.attributions.base import BROKEN, Attributed, Attribution
from manyheads.explain.attributions.feature_maps import pixels_of
from manyheads.explain.attributions.feed import Feed, Position, Score, Target, score_of

Operation = Callable[[Tensor, Any], Tensor]  # x, weight (None where there is none) -> x times it, without a bias


class LayerwiseRelevance(Attribution):
    """Each layer hands the relevance R of its outputs on to its inputs, in the shares that these had in them.

        R_i = x_i sum_j (alpha z+_ij / sum_i z+_ij - (alpha - 1) z-_ij / sum_i z-_ij) R_j / x_i,   z_ij = x_i w_ij

    z+, z-: the positive and negative of them; alpha=1, by default, hands on positive shares only. From y, the logit of
    the target, down to the pixels, which get x_i w_ij - low w+_ij - high w-_ij in place of z_ij (the z^B rule; low and
    high: the least and greatest of each colour, or zero). Biases get nothing, and a batch norm is one with the
    convolution before it, so that nothing is lost: the sum of all R is y, but for outputs that no input has a share in.
    Maxima hand all to the greatest, means and sums share out as a layer of ones does, ReLUs hand on.

    For models of these layers alone (VGG, ResNet); any other operation is refused by name. Shapes: [b, height, width],
    summed over channels.

    Source: Li, Tian, Mueller, Chen, Beyond Saliency, arXiv:1712.08268, whose rules these are (from Bach et al. 2015 and
    Montavon et al. 2017); its released notebooks take alpha=1 for linear layers and z with the bias for convolutions.
    """

    of_target = True

    def __init__(self, model: nn.Module, *, alpha: float = 1.0, score: Score | None = None):
        super().__init__(model, score=score)
        if alpha < 1:
            raise ValueError(f"alpha={alpha}; want at least 1, of which alpha - 1 is taken from negative shares")
        self.alpha = alpha

    def _attribute(self, feed: Feed, target: Target, position: Position) -> Attributed:
        if position is not None:
            raise ValueError("position= means nothing for a picture's class: leave it out")
        pixels = pixels_of(feed).detach().requires_grad_()
        with torch.enable_grad():
            with _Rules(type(feed.model).__name__, pixels, self.alpha):
                output = feed(**{feed.main: pixels})
            score = score_of(output, feed, target, None, self.score)
        (found,) = torch.autograd.grad(score, pixels, score.detach())
        if not bool(found.isfinite().all()):
            raise ValueError(f"relevance holds NaN or infinity: {BROKEN}")
        return found.sum(1)


class _Share(torch.autograd.Function):
    """y as it is; its backward hands relevance on by `rule`, [y's shape] -> [x's shape]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rule = rule
        return y.clone()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        return ctx.rule(relevance), None, None


def _share(x: Tensor, y: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    found: Tensor = _Share.apply(x, y, rule)
    return found


def _divided(relevance: Tensor, total: Tensor) -> Tensor:
    return torch.where(total != 0, relevance / torch.where(total != 0, total, 1.0), 0.0)


def _pulled(parts: Sequence[tuple[Tensor, Any]], operation: Operation, relevance: Tensor) -> Tensor:
    """The shares of x in sum of operation(x, w) over parts, times relevance, added up over parts."""
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x, _ in parts]
        total = torch.stack([operation(x, w) for x, (_, w) in zip(given, parts, strict=True)]).sum(0)
        slopes = torch.autograd.grad(total, given, _divided(relevance, total.detach()))
    return torch.stack([x.detach() * slope for x, slope in zip(given, slopes, strict=True)]).sum(0)


def _alpha_beta(x: Tensor, weight: Tensor | None, operation: Operation, alpha: float, relevance: Tensor) -> Tensor:
    plus, minus = x.clamp_min(0), x.clamp_max(0)
    if weight is None:  # a layer of ones
        sides: Any = ([(plus, None)], [(minus, None)])
    else:
        up, down = weight.clamp_min(0), weight.clamp_max(0)
        sides = ([(plus, up), (minus, down)], [(plus, down), (minus, up)])
    found = alpha * _pulled(sides[0], operation, relevance)
    return found if alpha == 1 else found - (alpha - 1) * _pulled(sides[1], operation, relevance)


def _boxed(x: Tensor, weight: Tensor, operation: Operation, relevance: Tensor) -> Tensor:
    """The z^B rule."""
    low, high = (getattr(x.flatten(2), side)(-1)[..., None, None].expand_as(x) for side in ("amin", "amax"))
    parts = [(x, weight), (low.clamp_max(0), -weight.clamp_min(0)), (high.clamp_min(0), -weight.clamp_max(0))]
    return _pulled(parts, operation, relevance)


_KEPT = {"max_pool2d", "_max_pool2d", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze"}
_KEPT |= {"contiguous", "clone", "__getitem__", "__get__", "to", "float", "double", "cat", "chunk", "split", "movedim"}
_IN_PLACE = {"add_", "relu_", "__iadd__"}
_ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_MEANS = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}


class _Rules(TorchFunctionMode):
    """Gives every operation of a pass the backward by which relevance is handed on."""

    def __init__(self, name: str, pixels: Tensor, alpha: float) -> None:
        super().__init__()
        self.name, self.pixels, self.alpha = name, pixels, alpha
        self.linear: dict[int, tuple[Tensor, Tensor, Tensor, Operation]] = {}  # by the id of what a layer gave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        inplace = name in _IN_PLACE or kwargs.get("inplace", False)
        if not (inplace and args and isinstance(args[0], Tensor) and args[0].requires_grad):
            return self._ruled(func, name, args, kwargs)
        found = self._ruled(func, name, (args[0].clone(), *args[1:]), kwargs)
        return args[0].copy_(found)

    def _ruled(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        reads = [a.clone() if name in _IN_PLACE else a for a in args if isinstance(a, Tensor) and a.requires_grad]
        y = func(*args, **kwargs)
        if name in _KEPT or not (isinstance(y, Tensor) and y.requires_grad):
            return y
        if name in ("conv2d", "linear"):
            return self._layer(func, name, y, args, kwargs)
        if name == "batch_norm":
            return self._norm(y, args, kwargs)
        if name in ("relu", "relu_", "dropout") and not kwargs.get("training", False):
            return _share(reads[0], y, lambda relevance: relevance)
        if name in _MEANS:
            return self._shared(args[0], args[0].detach(), None, y, lambda t, w: func(t, *args[1:], **kwargs))
        if name in _ADDS and len(reads) == 2 and reads[0].shape == reads[1].shape and not kwargs:
            return self._sum(reads, y)
        raise ValueError(f"{self.name} computes {name}, which no rule of relevance here is for: use MapGradCAM")

    def _shared(self, x: Tensor, value: Tensor, weight: Tensor | None, y: Tensor, operation: Operation) -> Tensor:
        value = value.clone()  # a layer behind may write into it

        def rule(relevance: Tensor) -> Tensor:
            if x is self.pixels and weight is not None:
                return _boxed(value, weight, operation, relevance)
            return _alpha_beta(value, weight, operation, self.alpha, relevance)

        shared: Tensor = _share(x, y.detach(), rule)
        return shared

    def _layer(self, func: Any, name: str, y: Tensor, args: Any, kwargs: Any) -> Tensor:
        given = dict(zip(("input", "weight", "bias"), args, strict=False), **kwargs)
        x, weight = given["input"], given["weight"]
        rest, more = args[3:], {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}

        def operation(t: Tensor, w: Tensor) -> Tensor:
            found: Tensor = func(t, w, None, *rest, **more)
            return found

        found = self._shared(x, x.detach(), weight.detach(), y, operation)
        if name == "conv2d":
            self.linear[id(found)] = (found, x, weight.detach(), operation)
        return found

    def _norm(self, y: Tensor, args: Any, kwargs: Any) -> Tensor:
        order = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {"weight": None, "eps": 1e-5, **dict(zip(order, args, strict=False)), **kwargs}
        if id(given["input"]) not in self.linear:
            raise ValueError(f"{self.name} has a batch norm that is not right behind a convolution: use MapGradCAM")
        _, x, weight, operation = self.linear[id(given["input"])]
        gain = (given["running_var"] + given["eps"]).rsqrt()
        gain = gain if given["weight"] is None else gain * given["weight"].detach()
        return self._shared(x, x.detach(), weight * gain[:, None, None, None], y, operation)

    def _sum(self, reads: list[Tensor], y: Tensor) -> Tensor:
        values = torch.stack([t.detach() for t in reads])
        return self._shared(torch.stack(reads), values, None, y, lambda t, w: t.sum(0))


def salient_relevance(
    relevance: Tensor,
    *,
    patch: int = 7,
    nearest: int = 64,
    far: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
) -> Tensor:
    """Where a relevance map is unlike its surroundings: [b, height, width] -> the same, 0 to 1.

        S = mean over scales of 1 - exp(-mean of the `nearest` least d(p, q)),   d = |p - q| / patch / (1 + far |place|)

    p: a patch x patch square (half overlapping) at one scale; q: all others at this scale, at half and at a quarter of
    it; place: what lies between their centres, over the longer side; the map is brought to 0 to 1 beforehand. A scale
    at which the map is smaller than a patch is left out. No more than 2^22 distances are held at once.

    Source: Li et al., Beyond Saliency, arXiv:1712.08268, which takes this from Goferman et al., Context-Aware Saliency
    Detection (2010); patch, nearest, far and the scales are theirs. Their last step, which draws attention to what is
    near a focus, is no part of it.
    """
    if relevance.dim() != 3 or not relevance.is_floating_point() or 0 in relevance.shape:
        raise ValueError(f"relevance is {relevance.dtype} {list(relevance.shape)}; want floats [b, height, width]")
    if patch < 2 or nearest < 1 or far < 0 or not scales or not all(0 < s <= 1 for s in scales):
        raise ValueError(
            f"patch={patch}, nearest={nearest}, far={far}, scales={scales}: want patches of 2 cells or more, one "
            "neighbour or more, a distance that is not negative, and scales above 0, at most 1"
        )
    if min(relevance.shape[1:]) < patch:
        raise ValueError(f"a map of {list(relevance.shape[1:])} has no square of {patch} x {patch}: give patch=")
    rows = []
    for row in relevance:
        low, high = row.min(), row.max()
        if not bool((high - low).isfinite()):
            raise ValueError("the relevance map holds NaN or infinity")
        rows.append(
            _salient((row - low) / (high - low).clamp_min(torch.finfo(row.dtype).tiny), patch, nearest, far, scales)
        )
    return torch.stack(rows)


def _salient(row: Tensor, patch: int, nearest: int, far: float, scales: Sequence[float]) -> Tensor:
    found = []
    for scale in scales:
        sizes = [[round(side * scale / part) for side in row.shape] for part in (1, 2, 4)]
        if min(sizes[0]) < patch:
            continue
        read = [_squares(row, size, patch) for size in sizes if min(size) >= patch]
        squares, places = (torch.cat([one[i] for one in read]) for i in range(2))
        own, step = len(read[0][0]), max(2**22 // len(squares), 1)
        parts = []
        for start in range(0, own, step):
            cut = slice(start, min(start + step, own))
            distance = torch.cdist(squares[cut], squares, compute_mode="donot_use_mm_for_euclid_dist") / patch
            distance = distance / (1 + far * torch.cdist(places[cut], places))
            distance[torch.arange(len(distance)), torch.arange(cut.start, cut.stop)] = torch.inf  # itself
            least = distance.topk(min(nearest, len(squares) - 1), largest=False).values
            parts.append(1 - (-least.mean(-1)).exp() if least.shape[1] else least.sum(-1))
        found.append(_together(torch.cat(parts), sizes[0], row.shape, patch))
    return torch.stack(found).mean(0) if found else torch.zeros_like(row)


def _starts(side: int, patch: int) -> list[int]:
    """Where squares begin: every half patch, and the last at the rim."""
    return sorted({*range(0, side - patch + 1, max(patch // 2, 1)), side - patch})


def _squares(row: Tensor, size: list[int], patch: int) -> tuple[Tensor, Tensor]:
    """[n, patch^2] and their centres [n, 2], in units of the longer side."""
    small = (
        row if list(row.shape) == size else F.interpolate(row[None, None], size, mode="bilinear", antialias=True)[0, 0]
    )
    tops, lefts = (_starts(side, patch) for side in size)
    squares = torch.stack([small[t : t + patch, s : s + patch].flatten() for t in tops for s in lefts])
    centres = torch.tensor([[t + patch / 2, s + patch / 2] for t in tops for s in lefts])
    return squares, (centres / max(size)).to(row)


def _together(values: Tensor, size: list[int], whole: Sequence[int], patch: int) -> Tensor:
    """The mean of the squares that a cell is in, at the size of the whole map."""
    total, count = values.new_zeros(size), values.new_zeros(size)
    places = [(t, s) for t in _starts(size[0], patch) for s in _starts(size[1], patch)]
    for value, (t, s) in zip(values, places, strict=True):
        total[t : t + patch, s : s + patch] += value
        count[t : t + patch, s : s + patch] += 1
    mean = total / count
    return F.interpolate(mean[None, None], tuple(whole), mode="bilinear", align_corners=False)[0, 0]
