"""The two blocks of Next-ViT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, FeedForward, convolve, shown, square_means
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

_REFERENCE = "arXiv:2207.05501"
_TITLE = "Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic Industrial Scenarios"


class _Embedding(nn.Module):
    """Means of stride x stride cells, projected and normalised; x itself where neither size nor width changes."""

    def __init__(self, dim: int, features: int, stride: int) -> None:
        super().__init__()
        self.stride, same = stride, stride == 1 and dim == features
        self.project = None if same else nn.Linear(dim, features, bias=False)
        self.norm = None if same else CellNorm(features)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, real = square_means(x, real, self.stride)
        if self.project is not None and self.norm is not None:
            x = self.norm(self.project(x), real)
        return x, real


class _Convolution(nn.Module):
    """Multi-head convolutional attention: neither query nor key, but a convolution of each head by itself."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // head_dim, bias=False)
        self.norm, self.project = CellNorm(dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        output: Tensor = self.project(F.relu(self.norm(convolve(self.conv, x, real), real)))
        return output


class _Attention(nn.Module):
    """Attention to means of reduce^2 cells that follow each other in reading order."""

    def __init__(self, dim: int, heads: int, reduce: int) -> None:
        super().__init__()
        self.area, self.heads = reduce**2, Heads(dim, heads, True)
        self.norm = CellNorm(dim) if reduce > 1 else None

    def forward(self, x: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """x [b, n, e], real [b, n]"""
        source, seen, group, share = x, real, None, None
        if self.norm is not None:
            group, share = self._groups(x, real)
            count = max(x.shape[1] // self.area, 1)
            index = group.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
            means = x.new_zeros(len(x), count, x.shape[-1]).scatter_add(1, index, x * share[..., None])
            seen = x.new_zeros(len(x), count).scatter_add(1, group.clamp(min=0), share) > 0
            source = self.norm(means, seen)
        k, v = self.heads.read(source)
        mixed, weights = self.heads(x, k, v, key_mask(seen), need_weights)
        if weights is not None and group is not None and share is not None:
            spread = group.clamp(min=0)[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
            weights = weights.gather(3, spread) * share[:, None, None]
        return mixed, weights

    def _groups(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which mean each cell belongs to, [b, n], and its share; -1 and 0 for padding and for the last few cells that
        fill none, unless there are no others."""
        there = x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real
        place = there.cumsum(1) - 1
        total = there.sum(1, keepdim=True)
        whole = torch.where(total < self.area, total, total // self.area * self.area)
        belongs = there & (place < whole)
        group = torch.where(belongs, place // self.area, -1)
        return group, belongs.to(x.dtype) / total.clamp(min=1, max=self.area).to(x.dtype)


def _checked(name: str, features: int, heads: int, least: int, **values: float) -> int:
    """The width of a head."""
    wrong = {key: value for key, value in values.items() if value <= 0}
    slim = int(features * values["mlp_ratio"]) < 1
    if wrong or slim or features < 1 or features % heads or heads < least or values["stride"] > 2:
        raise ValueError(
            f"{name}: features={features}, heads={heads}, {values}; want features divisible by heads, heads >= {least},"
            " a stride of 1 or 2, at least one feature in the MLP, and the others positive"
        )
    return features // heads


@register
class NextViTConvolution(Mechanism):
    """Next convolution block: each head is a convolution of its features, and an MLP follows.

        x = BN(W mean over stride x stride cells of x);  x = x + P relu(BN(conv3x3(x)));  y = x + MLP(BN x)

    The convolution has a group for each head, P mixes all of them; nothing is normalised in front of it. The paper
    calls it multi-head convolutional attention; there is no query, key or softmax, and there are no weights. Without a
    change of size or width the first step is left out. The mechanism is the whole block; x: [b, height, width, dim] ->
    [b, .., .., features]. Padded cells are zeros for the convolution and enter no statistics.

    Source: Li et al., Next-ViT, arXiv:2207.05501.
    Weights: patch_embed.conv, .norm are embedding.project, .norm; mhca.group_conv3x3, .norm, .projection are
    convolution.conv, .norm, .project; norm is norm; mlp.conv1, .conv2 are mlp.up, .down; kernels of 1 x 1 lose their
    last two axes.
    """

    card = Card(
        name="next-vit-convolution",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n",
        state="",
        decodes=False,
        resizes="1 / stride",
        notes="A block of its own, with residuals, norms and MLP. In Next-ViT four or so of it stand in front of one "
        "next-vit.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        features: int | None = None,
        stride: int = 1,
        mlp_ratio: float = 3.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        size = self.result_dim = dim if features is None else features
        head_dim = _checked(self.card.name, size, heads, 1, stride=stride, mlp_ratio=mlp_ratio)
        self.stride, self.embedding = stride, _Embedding(dim, size, stride)
        self.convolution, self.norm = _Convolution(size, head_dim), CellNorm(size)
        self.mlp = FeedForward(size, int(size * mlp_ratio), nn.ReLU())

    def result_size(self, *size: Any) -> Any:
        return tuple(-(-side // self.stride) for side in size)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x, real = self.embedding(x, call.padding)
        x = x + self.convolution(x, real)
        return Result(x + self.mlp(self.norm(x, real)))


@register
class NextViT(Mechanism):
    """Next transformer block: attention in three quarters of the features, convolution of it in the others.

        a = BN(W mean over stride x stride cells of x);  a = a + E(BN a)
        c = BN(W' a);  c = c + P relu(BN(conv3x3(c)));  x = [a ; c];  y = x + MLP(BN x)
        E: softmax(q(z) k(z')^T / sqrt(d)) v(z'),  z' = BN of the means of reduce^2 consecutive cells in reading order

    Features and heads are split alike: the first round(3/4 heads) heads attend, the others convolve, and have zero
    weights in the [b, heads, n, n] returned (for stride 1), where those of a mean are spread evenly over its cells. The
    mechanism is the whole block; x: [b, height, width, dim] -> [b, .., .., features]. Padded cells are in no mean, no
    convolution and no statistics.

    Source: arXiv:2207.05501, where means are of squares; the released code, followed here, takes them along the rows.
    As there, the last cells that fill no mean are no keys; fewer cells than one mean takes are one, where it would
    fail. There features are split in steps of 32, the width of all its heads.
    Weights: patch_embed, norm1, projection, mhca, norm2, mlp are embedding, norm_attention, projection, convolution,
    norm, mlp, inside as of next-vit-convolution; e_mhsa.q, .k, .v, .proj are attention.heads.q_proj, .k_proj, .v_proj,
    .o_proj, and e_mhsa.norm is attention.norm.
    """

    card = Card(
        name="next-vit",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n^2 / reduce^2",
        state="",
        decodes=False,
        example={"reduce": 2},
        resizes="1 / stride",
        notes="A block of its own, with residuals, norms and MLP. In Next-ViT it ends a group of next-vit-convolution.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        features: int | None = None,
        stride: int = 1,
        reduce: int = 1,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        size = self.result_dim = dim if features is None else features
        head_dim = _checked(self.card.name, size, heads, 3, stride=stride, reduce=reduce, mlp_ratio=mlp_ratio)
        self.attending = int(0.75 * heads + 0.5)
        wide = self.attending * head_dim
        self.stride, self.embedding = stride, _Embedding(dim, wide, stride)
        self.norm_attention, self.attention = CellNorm(wide), _Attention(wide, self.attending, reduce)
        self.projection = _Embedding(wide, size - wide, 1)
        self.convolution, self.norm = _Convolution(size - wide, head_dim), CellNorm(size)
        self.mlp = FeedForward(size, int(size * mlp_ratio), nn.ReLU())

    def result_size(self, *size: Any) -> Any:
        return tuple(-(-side // self.stride) for side in size)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        a, real = self.embedding(x, call.padding)
        z = shown(self.norm_attention(a, real), real)
        seen = None if real is None else real.flatten(1)
        mixed, weights = self.attention(z.flatten(1, 2), seen, call.need_weights and self.stride == 1)
        a = a + mixed.unflatten(1, tuple(a.shape[1:3]))
        c, _ = self.projection(a, real)
        c = c + self.convolution(c, real)
        x = torch.cat([a, c], -1)
        if weights is not None:
            weights = F.pad(weights, (0, 0, 0, 0, 0, self.heads - self.attending))
        return Result(x + self.mlp(self.norm(x, real)), weights)
