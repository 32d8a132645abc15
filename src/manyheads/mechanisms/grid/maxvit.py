"""Multi-axis attention, of MaxViT, and its block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, FeedForward, cell_mean, convolve, shown, square_means
from manyheads.functional.grid_bias import OffsetBias
from manyheads.functional.grid_extents import over_extents
from manyheads.functional.grid_windows import attend_cells, blocks, spread, windows_of
from manyheads.functional.multihead import Heads
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

_REFERENCE, _TITLE = "arXiv:2204.01697", "MaxViT: Multi-Axis Vision Transformer"


class _Partition(nn.Module):
    """Attention with relative positions among window x window cells, next to each other or spread over the map."""

    def __init__(self, dim: int, heads: int, window: int, apart: bool) -> None:
        super().__init__()
        self.window, self.apart = window, apart
        self.attention, self.positions = Heads(dim, heads, True), OffsetBias(heads, (window, window))

    def forward(self, x: Tensor, real: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        lay, bias = spread if self.apart else blocks, self.positions()

        def run(part: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
            sizes = part.shape[1:3]
            windows = windows_of([lay(size, self.window) for size in sizes], sizes, device=x.device)
            return attend_cells(self.attention, part, windows, seen, need_weights, bias)

        x = shown(x, real)
        return over_extents(x, real, run) if self.apart else run(x, real)


def _positive(name: str, window: int) -> None:
    if window < 1:
        raise ValueError(f"{name}: window={window}; want an integer >= 1")


@register
class MaxViTBlock(Mechanism):
    """Block attention: cells attend within window x window squares, with a bias for each offset.

        softmax(q k^T / sqrt(d) + B[offset]) v,  B a table of (2 window - 1)^2 numbers for each head

    The local half of multi-axis attention; maxvit-grid is the other. x: [b, height, width, dim]; a square at the rim
    attends to the cells that it has (the released code wants sides divisible by the window). Only the attention: norms,
    residual and MLP stand around it.

    Source: Tu et al., MaxViT: Multi-Axis Vision Transformer, arXiv:2204.01697.
    Weights: as of maxvit.
    """

    card = Card(
        name="maxvit-block",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 5},
        notes="Squares do not exchange anything: put maxvit-grid between the layers.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, window: int = 7) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        _positive(self.card.name, window)
        self.partition = _Partition(dim, heads, window, False)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(*self.partition(x, call.padding, call.need_weights))


@register
class MaxViTGrid(Mechanism):
    """Grid attention: window x window cells that are spread evenly over the whole map attend to each other.

        cells (i + u ceil(height / window), j + v ceil(width / window)) for u, v < window, with a bias for each offset
        (u, v) out of a table

    Sparse and global, linear in the cells. x: [b, height, width, dim]; height and width are those of the box of real
    cells, and a group has fewer cells where they are no multiple of the window (the released code wants one).

    Source: arXiv:2204.01697.
    Weights: as of maxvit.
    """

    card = Card(
        name="maxvit-grid",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 4},
        notes="Neighbours do not see each other: put maxvit-block between the layers.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, window: int = 7) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        _positive(self.card.name, window)
        self.partition = _Partition(dim, heads, window, True)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(*self.partition(x, call.padding, call.need_weights))


class _Convolutions(nn.Module):
    """The inverted bottleneck in front, MBConv, with squeeze and excitation; stride 2 halves the map, rounded up."""

    def __init__(self, dim: int, features: int, stride: int) -> None:
        super().__init__()
        wide, narrow, self.stride = 4 * features, max(int(0.25 * features), 1), stride
        self.norm_in, self.norm_up, self.norm_deep = (CellNorm(size, eps=1e-3) for size in (dim, wide, wide))
        self.up, self.down = nn.Linear(dim, wide, bias=False), nn.Linear(wide, features)
        self.deep = nn.Conv2d(wide, wide, 3, stride=stride, groups=wide, bias=False)
        self.squeeze, self.excite = nn.Linear(wide, narrow), nn.Linear(narrow, wide)
        self.shortcut = nn.Linear(dim, features) if features != dim else nn.Identity()

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z = self._gelu(self.norm_up(self.up(self.norm_in(x, real)), real))
        after = [-size % 2 + 1 if self.stride == 2 else 1 for size in x.shape[1:3]]
        before = 0 if self.stride == 2 else 1
        kept, seen = square_means(x, real, self.stride)
        z = convolve(self.deep, F.pad(shown(z, real), (0, 0, before, after[1], before, after[0])))
        z = self._gelu(self.norm_deep(z, seen))
        gate = self.excite(F.silu(self.squeeze(cell_mean(z, seen)))).sigmoid()
        return self.shortcut(kept) + self.down(z * gate), seen

    def _gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


@register
class MaxViT(Mechanism):
    """The whole block: a convolution, then attention within squares, then attention spread over the map.

        x = MBConv(x);  x = x + Block(LN x);  x = x + MLP(LN x);  x = x + Grid(LN x);  y = x + MLP(LN x)
        MBConv: skip(x) + W_down (g * act(BN(conv3x3(act(BN(W_up BN(x)))))), act = GELU, 4 features wide,
        g = sigmoid(W_e silu(W_s mean over the map))

    Block, Grid: as maxvit-block and maxvit-grid. stride=2: the first block of a stage; height and width are halved,
    rounded up, and skip(x) is the mean of 2 x 2 cells, projected where features is another number than dim. Residuals,
    norms and MLPs are inside. x: [b, height, width, dim] -> [b, .., .., features]; BN takes its statistics of real
    cells. Weights, of stride 1 only: the product of both attentions, how much comes through both.

    Source: arXiv:2204.01697 and the configuration with its published weights: BN eps 1e-3, LN eps 1e-5, GELU of tanh,
    at stride 2 a convolution that reads two cells after each kept one's place and none before.
    Weights: of timm, conv.pre_norm, conv1_1x1, norm1, conv2_kxk, norm2, se.fc1, se.fc2, conv3_1x1, shortcut.expand are
    convolution.norm_in, .up, .norm_up, .deep, .norm_deep, .squeeze, .excite, .down, .shortcut, kernels of 1 x 1 without
    their last two axes; attn_block, attn_grid: attn.qkv holds q, k, v in this order (head by head where head_first).
    """

    card = Card(
        name="maxvit",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 4},
        resizes="1 / stride",
        notes="A block of its own, with residuals, norms and MLPs.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        window: int = 7,
        stride: int = 1,
        features: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.result_dim = dim if features is None else features
        _positive(self.card.name, window)
        if stride not in (1, 2) or self.result_dim < 1 or self.result_dim % heads or mlp_ratio * self.result_dim < 1:
            raise ValueError(
                f"{self.card.name}: stride={stride}, features={self.result_dim}, mlp_ratio={mlp_ratio}; want stride 1 "
                f"or 2, features divisible by heads={heads}, and an MLP of at least one unit"
            )
        self.stride, size = stride, self.result_dim
        self.convolution = _Convolutions(dim, size, stride)
        self.block, self.grid = (_Partition(size, heads, window, apart) for apart in (False, True))
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=1e-5) for _ in range(4))
        self.mlps = nn.ModuleList(FeedForward(size, int(mlp_ratio * size), nn.GELU("tanh")) for _ in range(2))

    def result_size(self, *size: Any) -> Any:
        return tuple(-(-side // self.stride) for side in size)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        need = call.need_weights and self.stride == 1
        x, real = self.convolution(shown(x, call.padding), call.padding)
        through: list[Tensor] = []
        for i, partition in enumerate((self.block, self.grid)):
            mixed, weights = partition(self.norms[2 * i](x), real, need)
            x = x + mixed
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
            if weights is not None:
                through.append(weights)
        return Result(x, through[1] @ through[0] if len(through) == 2 else None)
