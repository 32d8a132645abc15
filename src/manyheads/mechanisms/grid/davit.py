"""The two blocks of DaViT: attention of cells within windows, and of features over the whole map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import FeedForward, convolve, depthwise, shown
from manyheads.functional.grid_windows import attend_cells, blocks, windows_of
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.multihead import Heads
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

_REFERENCE, _TITLE = "arXiv:2204.03645", "DaViT: Dual Attention Vision Transformers"


class _Block(nn.Module):
    """What both blocks have around their attention; padded cells are zeros in front of every layer that mixes."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.position_attention, self.position_mlp = depthwise(dim, 3), depthwise(dim, 3)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, real: Tensor | None, attend: Callable[[Tensor], Tensor]) -> Tensor:
        x = x + convolve(self.position_attention, x, real)
        x = x + attend(shown(self.norm_attention(x), real))
        x = x + convolve(self.position_mlp, x, real)
        return x + self.mlp(self.norm_mlp(x))


def _checked(name: str, mlp_ratio: float, dim: int, window: int = 1) -> None:
    if int(dim * mlp_ratio) < 1 or window < 1:
        raise ValueError(f"{name}: mlp_ratio={mlp_ratio}, window={window}; want an MLP and a window of at least 1")


@register
class DaViTSpatial(Mechanism):
    """Cells attend within windows; convolutions of 3 x 3 around a cell say where it is.

        x = x + conv(x);  x = x + W(LN x);  x = x + conv'(x);  y = x + MLP(LN x)
        W: softmax(q k^T / sqrt(d)) v among the cells of each window x window square, without shift and positions

    The mechanism is the whole block, residuals, norms and MLP included. x: [b, height, width, dim]; squares at the rim
    attend to the real cells that they have. Matrix: of the attention.

    Source: Ding et al., DaViT: Dual Attention Vision Transformers, arXiv:2204.03645. The released code fills the rim up
    with zeros behind the norm, which are keys (of its biases) there.
    Weights: cpe.0.proj, cpe.1.proj are block.position_attention, .position_mlp; norm1, norm2 are block.norm_attention,
    .norm_mlp; attn.qkv is attention.q_proj, .k_proj, .v_proj in this order, attn.proj is attention.o_proj; mlp.fc1,
    .fc2 are block.mlp.up, .down.
    """

    card = Card(
        name="davit-spatial",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 3},
        notes="A block of its own, with residuals, norms and MLP. In DaViT it alternates with davit-channel.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        window: int = 7,
        mlp_ratio: float = 4.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        _checked(self.card.name, mlp_ratio, dim, window)
        self.window, self.attention, self.block = window, Heads(dim, heads, bias), _Block(dim, mlp_ratio)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sizes, weights = x.shape[1:3], None
        windows = windows_of([blocks(size, self.window) for size in sizes], sizes, device=x.device)

        def attention(cells: Tensor) -> Tensor:
            nonlocal weights
            mixed, weights = attend_cells(self.attention, cells, windows, call.padding, call.need_weights)
            return mixed

        return Result(self.block(x, call.padding, attention), weights)


@register
class DaViTChannel(Mechanism):
    """Features attend to each other over the whole map, in groups: cost is linear in the cells, and global.

        A = softmax(k^T v / sqrt(d)) [d, d] in each of the `heads` groups of d features;  o = q A^T
        x = x + conv(x);  x = x + W o(LN x);  x = x + conv'(x);  y = x + MLP(LN x)

    The mechanism is the whole block. x: [b, height, width, dim]; padded cells enter no sum. There is no matrix over
    cells, so there are no weights to return.

    Source: arXiv:2204.03645, where scores are made of queries and keys and values are mixed; in the released code,
    followed here, of keys and values, and queries are mixed: the same up to the names of the three projections.
    Weights: as of davit-spatial, attn.qkv being q_proj, k_proj, v_proj in this order and attn.proj o_proj.
    """

    card = Card(
        name="davit-channel",
        title=_TITLE,
        reference=_REFERENCE,
        family=Family.GRID,
        patterns={"grid"},
        time="n",
        state="",
        decodes=False,
        notes="A block of its own, with residuals, norms and MLP. In DaViT it alternates with davit-spatial.",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, mlp_ratio: float = 4.0, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        _checked(self.card.name, mlp_ratio, dim)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.block = _Block(dim, mlp_ratio)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(self.block(x, call.padding, lambda cells: self._features(cells, call.padding)))

    def _features(self, x: Tensor, real: Tensor | None) -> Tensor:
        cells = x.flatten(1, 2)
        q, k, v = (
            layer(cells).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if real is not None:
            k = k.masked_fill(~real.flatten(1)[:, None, :, None], 0.0)
        weights = masked_softmax((k * self.head_dim**-0.5).mT @ v, None)
        mixed = (q @ weights.mT).transpose(1, 2).flatten(2)
        output: Tensor = self.o_proj(mixed)
        return output.unflatten(1, tuple(x.shape[1:3]))
