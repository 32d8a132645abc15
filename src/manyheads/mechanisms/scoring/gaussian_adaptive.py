"""Gaussian adaptive attention: tokens count by how far they lie from learned centres."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import shown
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-8


@register
class GaussianAdaptive(Mechanism):
    """Features are rescaled by a density over the tokens: no queries, keys or values, and few parameters.

        y_ifk = (x_if - mean_f - delta_k) / sqrt(var_f + 1e-8)
        w_if = prod_k exp(-y_ifk^2 / (2 c_k^2)) / (its sum over tokens);  out_if = w_if x_if

    mean, var (unbiased): of feature f over the real tokens; delta, c: [heads, gaussians], head h for its dim / heads
    features. Weights belong to single features, so that there is no matrix from token to token: weights is None, and
    `densities(x)` gives w [b, n, dim], of which `importance_factor` makes the explanation that the paper proposes. As
    w sums to one over the tokens, the sum of the output over them is its pooled form.
    Source: Ioannides et al., arXiv:2401.11143, and its code, which multiplies densities where the paper speaks of a
    mixture. There the heads cut the axis that is normalised (the tokens) into stretches, which needs at least as
    many tokens as heads; here they are features. Padding is not in mean and variance, and its output
    is zero. The importance factor is not in the code: taken from the paper as remembered.
    Weights: row h of mean_offsets and widths is attention_heads.h.mean_offsets and .c.
    """

    card = Card(
        name="gaussian-adaptive",
        title="Gaussian Adaptive Attention is All You Need",
        reference="arXiv:2401.11143",
        family=Family.SCORING,
        patterns={"noncausal-self"},
        time="n",
        state="",
        decodes=False,
        notes="no causal form: mean and variance are those of the whole sequence",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, gaussians: int = 4) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if gaussians < 1:
            raise ValueError(f"gaussian-adaptive: gaussians={gaussians} must be at least 1")
        self.mean_offsets = nn.Parameter(torch.zeros(heads, gaussians))
        self.widths = nn.Parameter(torch.randn(heads, gaussians).exp())

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "gaussian-adaptive: a dense mask was given, but a token has one weight for all queries; give key "
                "padding [batch, n] as the mask"
            )
        weights = self.densities(x, mask=call.padding)
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
        return Result(weights * x)

    def densities(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x [b, n, dim], mask [b, n] True = real -> w [b, n, dim], each feature's sum over the tokens being one."""
        wide, real = widen(x), None if mask is None else mask[..., None]
        count = x.new_tensor(x.shape[1], dtype=torch.long) if real is None else real.sum(1, keepdim=True)
        mean = _hidden(wide, real).sum(1, keepdim=True) / count.clamp(min=1)
        centred = _hidden(wide - mean, real)
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1) + EPS
        # A product of Gaussian densities is one, of summed precision, up to a factor that all tokens share and that is
        # divided out: the rest is a softmax.
        precision = self.widths.to(wide.dtype).square().reciprocal()
        total = precision.sum(-1)
        offset = (precision * self.mean_offsets.to(wide.dtype)).sum(-1) / total
        total, offset = (t.repeat_interleave(self.dim // self.heads) for t in (total, offset))
        logits = (centred - offset).square() * (-total / (2 * variance))
        if real is None:
            return logits.softmax(1).to(x.dtype)
        weights = logits.masked_fill(~real, -torch.inf).softmax(1)
        return weights.masked_fill(~real.any(1, keepdim=True), 0.0).to(x.dtype)


def _hidden(tokens: Tensor, real: Tensor | None) -> Tensor:
    return tokens if real is None else tokens.masked_fill(~real, 0.0)


AXES = {"height": 1, "width": 2, "channels": 3}


@register
class GaussianAdaptiveMap(Mechanism):
    """A feature map is rescaled by densities along one of its axes, each head for a stretch of it.

        y_ik = (x_i - mean - delta_k) / sqrt(var + 1e-8)
        w_i = prod_k exp(-y_ik^2 / (2 c_k^2)) / (its sum over the stretch);   out_i = w_i x_i

    i: places of a stretch along `axis` ("height", "width" or "channels"), for each line of the map; mean and var
    (unbiased) are those of the stretch. Head h has floor(n / heads) of the n places, the last head the rest, and fewer
    places than heads are all the last head's. Places are counted over rows and columns that hold something, padded
    cells are in no mean and give zeros. The block around it is x + out. Weights belong to single numbers, so that there
    is no matrix from cell to cell; `densities(x)` gives w.

    Source: Ioannides et al., arXiv:2401.11143, and its code for maps (norm_axis), which multiplies densities where the
    paper speaks of a mixture. Where all of a stretch are too small for a float, as a single place's may be, it gives
    zeros; here they are compared by their logarithms.
    Weights: row h of mean_offsets and widths is attention_heads.h.mean_offsets and .c.
    """

    card = Card(
        name="gaussian-adaptive-map",
        title="Gaussian Adaptive Attention is All You Need (for feature maps)",
        reference="arXiv:2401.11143",
        family=Family.SCORING,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        example={"heads": 2},
        notes="heads cut the axis; along channels no cell sees another",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, axis: str = "height", gaussians: int = 4) -> None:
        super().__init__(dim, heads, causal=causal)
        if axis not in AXES or gaussians < 1:
            raise ValueError(
                f"gaussian-adaptive-map: axis={axis!r}, gaussians={gaussians}; want an axis of {list(AXES)} and at "
                "least one Gaussian"
            )
        self.axis = AXES[axis]
        self.mean_offsets = nn.Parameter(torch.zeros(heads, gaussians))
        self.widths = nn.Parameter(torch.randn(heads, gaussians).exp())

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x = shown(x, call.padding)
        return Result(self.densities(x, mask=call.padding) * x)

    def densities(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x [b, height, width, dim], mask [b, height, width] True = real -> w, of the shape of x."""
        lines = widen(x).movedim(self.axis, 1)
        there = torch.ones_like(x[:1, ..., :1], dtype=torch.bool) if mask is None else mask[..., None]
        owner = self._owners(x, there)
        index = owner[:, :, None, None].expand(lines.shape)
        real = there.movedim(self.axis, 1).expand(lines.shape)
        none = lines.new_zeros(len(x), self.heads, *lines.shape[2:])

        def stretch(values: Tensor) -> Tensor:
            """Sums over the stretch of each place."""
            return none.scatter_add(1, index, values.masked_fill(~real, 0.0)).gather(1, index)

        count = stretch(torch.ones_like(lines))
        centred = lines - stretch(lines) / count.clamp(min=1)
        variance = stretch(centred.square()) / (count - 1).clamp(min=1) + EPS
        # As above: a product of Gaussians is one, of summed precision.
        precision = self.widths.to(lines.dtype).square().reciprocal()
        total = precision.sum(-1)
        offset = (precision * self.mean_offsets.to(lines.dtype)).sum(-1) / total
        total, offset = (t[owner][:, :, None, None] for t in (total, offset))
        logits = ((centred - offset).square() * (-total / (2 * variance))).masked_fill(~real, -torch.inf)
        high = (none - torch.inf).scatter_reduce(1, index, logits.detach(), "amax").gather(1, index)
        weights = (logits - high.clamp(min=torch.finfo(lines.dtype).min)).exp()
        sums = stretch(weights)
        found = weights / torch.where(sums > 0, sums, torch.ones_like(sums))
        return found.movedim(1, self.axis).to(x.dtype)

    def _owners(self, x: Tensor, there: Tensor) -> Tensor:
        """Which head has each place of the axis, [b or 1, n]."""
        if self.axis == AXES["channels"]:
            used = torch.ones(1, x.shape[3], dtype=torch.bool, device=x.device)
        else:
            used = there[..., 0].any(3 - self.axis)
        each = used.sum(1, keepdim=True) // self.heads
        rank = (used.cumsum(1) - 1).clamp(min=0)
        return torch.where(each > 0, (rank // each.clamp(min=1)).clamp(max=self.heads - 1), self.heads - 1)


def importance_factor(densities: Tensor) -> Tensor:
    """(w - min w) / (max w - min w) over all values: which tokens and features the mechanism brings forward, in [0, 1].

    densities: any shape; of many inputs, average them first. Where all are equal, zeros.
    """
    low, high = densities.min(), densities.max()
    return (densities - low) / torch.where(high > low, high - low, torch.ones_like(high))
