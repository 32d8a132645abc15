"""Terminator's block of ten branches, and its gate over channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import cell_mean, shown
from manyheads.functional.hyper_kernels import SlowNet, filter_each, pool_bins, standardise
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

BRANCHES = 10


class _Gated(nn.Module):
    """A recursive gated unit: W_y (GELU(standardise(W_k z * W_q W_v z)) + p), p a learned map shared by channels."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(dim, dim) for _ in range(3))
        # What is standardised next needs no bias.
        self.out = nn.Linear(dim, dim, bias=False)
        self.place_bias = nn.Parameter(torch.zeros(size, size))

    def forward(self, z: Tensor, real: Tensor) -> Tensor:
        mixed = F.gelu(standardise(self.key(z) * self.query(self.value(z)), real))
        output: Tensor = self.out(mixed + self.place_bias[: z.shape[1], : z.shape[2], None])
        return output


class _Local(nn.Module):
    """GELU(standardise(W_c of a map filtered by windows that another map makes)) + b."""

    def __init__(self, dim: int, heads: int, size: int, hidden: int, layers: int, omega: float) -> None:
        super().__init__()
        self.slow = SlowNet(size, hidden, layers, heads, omega)
        self.reduce, self.seen_proj = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        self.scales = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        for scale in self.scales:
            nn.init.ones_(scale.bias)  # type: ignore[arg-type]
        self.channel_mixer = nn.Linear(dim, dim, bias=False)
        self.fast_bias = nn.Parameter(torch.zeros(1))

    def forward(self, seen: Tensor, maps: Tensor, real: Tensor) -> Tensor:
        small = F.gelu(self.seen_proj(self.reduce(pool_bins(seen, real, self.slow.size))))
        windows = self.slow([scale(small) for scale in self.scales])
        return F.gelu(standardise(self.channel_mixer(filter_each(maps, windows)), real)) + self.fast_bias


def _by_channels(slow: SlowNet, mean: Tensor) -> Tensor:
    """w_c mean_c^2 for means [b, 1, 1, e], w from the slow net's line of channels."""
    return slow()[:, 0] * widen(mean).square()


@register
class HyperChannel(Mechanism):
    """Channels are gated by their own squared means, each weighed by what a network makes of the channel's place.

        y_c = x_c sigmoid(w_c mean(x_c)^2),   w = out h_l;  h_0 = sin(F_0 c),  h_l = sin(F_l c) (L_l h_(l-1)) + p_c

    c: the channel's place in [-1, 1]: HyperZZW in its one-dimensional form, Z Z W elementwise, over the channels. mean:
    over the real cells. heads has no meaning here and changes nothing. There are no weights from cell to cell.

    Source: Zhang, HyperZZW Operator Connects Slow-Fast Networks, arXiv:2401.17948, and the released
    HyperChannelInteract and MAGNet_GC. A form for sequences is not released.
    """

    card = Card(
        name="hyper-channel",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks (hyper-channel interaction)",
        reference="arXiv:2401.17948",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height width",
        state="",
        decodes=False,
        example={"hidden": 6},
        notes="a gate per channel; maps of any size",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        hidden: int = 16,
        layers: int = 3,
        omega: float = 10.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if hidden < 1 or layers < 1:
            raise ValueError(f"hyper-channel: hidden={hidden}, layers={layers}; want at least 1 of each")
        self.slow = SlowNet(dim, hidden, layers, 1, omega, axes=1)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        x = shown(x, call.padding)
        return Result(x * _by_channels(self.slow, cell_mean(x, call.padding)).sigmoid().to(x.dtype))


@register
class Terminator(Mechanism):
    """Ten views of a map side by side: three of all cells at once, four of windows, and gates between them.

        C = K z;   f = s(G_1 z + G_2 C),   m = s(W z),   c = s(z sigmoid(w_c mean(z)^2))
        g = C f,  g_m = C m,  g_c = C c  (products of maps as matrices);   i = z sigmoid(w_s mean_c(g)^2 w'_c mean(g)^2)
        l_1 = L(z; c),  l_2 = L(c; z),  l_3 = L(m; z),  l_4 = L(z; m)
        y = GELU(s(W_o [g, l_2, f, g_m, l_1, g sigmoid(g), l_3, g_c, l_4, i])) + b

    s: zero mean, unit variance per image and channel over the real cells. K, w: networks of the coordinates, of the
    whole map and of the channels' line. G: a recursive gated unit. L(a; b): b filtered by windows that a makes, as in
    hyper-zzw-local; windows: their sizes. For maps of up to size x size: smaller ones read the corner of K, larger ones
    are refused. Head h is a group of dim / heads channels that share kernels; published: heads = dim. The code's last
    map doubles the channels, which are kept here. There is no residual, and no matrix of weights that channels share.

    Source: Zhang, HyperZZW Operator Connects Slow-Fast Networks, arXiv:2401.17948, with the released
    FastMultiBranchLayer and SFNEBlock, without the inputs of earlier blocks, which are concatenated to the branches
    there. Standardisations over the batch, half of those behind W_o among them, are here over each image, which is what
    they give for a batch of one; biases in front of one are left out. The first term of the windows' renormalisation is
    not cut from the gradient.
    """

    card = Card(
        name="terminator",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction (block)",
        reference="arXiv:2401.17948",
        family=Family.CONVOLUTION,
        patterns={"grid"},
        time="height^2 width",
        state="",
        decodes=False,
        example={"size": 13, "hidden": 2, "windows": [3, 3, 1, 5], "layers": 1},
        notes="a block of its own, without a residual; for maps of up to size x size; its kernel is tied to places",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        size: int = 32,
        windows: Sequence[int] = (3, 5, 7, 9),
        hidden: int = 16,
        layers: int = 2,
        omega: float = 10.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if min(size, hidden, layers) < 1 or len(windows) != 4 or any(w < 1 or w % 2 == 0 for w in windows):
            raise ValueError(
                f"terminator: size={size}, windows={list(windows)}, hidden={hidden}, layers={layers}; "
                "want four odd windows and at least 1 of the others"
            )
        self.size = size
        self.slow = SlowNet(size, hidden, layers, heads, omega)
        self.gated, self.gated_slow = _Gated(dim, size), _Gated(dim, size)
        self.mixer = nn.Linear(dim, dim, bias=False)
        self.channels = SlowNet(dim, hidden, layers, 1, omega, axes=1)
        self.crossed_channels = SlowNet(dim, hidden, layers, 1, omega, axes=1)
        self.crossed_places = SlowNet(size, hidden, layers, 1, omega)
        self.local = nn.ModuleList(_Local(dim, heads, window, hidden, layers, omega) for window in windows)
        self.out_proj = nn.Linear(BRANCHES * dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if max(x.shape[1:3]) > self.size:
            raise ValueError(
                f"terminator: x has shape {tuple(x.shape)}; its kernel is made for {self.size} x {self.size} cells: "
                f"build it with size={max(x.shape[1:3])} or more"
            )
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if call.padding is None else call.padding[..., None]
        z = x.masked_fill(~real, 0.0)
        kernel = self.slow()[: x.shape[1], : x.shape[2]].repeat_interleave(self.head_dim, -1)
        rows = kernel * z
        fast = standardise(self.gated_slow(rows, real) + self.gated(z, real), real)
        mixed = standardise(self.mixer(z), real)
        gate = _by_channels(self.channels, cell_mean(z, call.padding)).sigmoid().to(z.dtype)
        channels = standardise(z * gate, real)
        whole, whole_mixed, whole_channels = (
            _product(rows, maps).masked_fill(~real, 0.0) for maps in (fast, mixed, channels)
        )
        pairs = ((z, channels), (channels, z), (mixed, z), (z, mixed))
        one, two, three, four = (part(*pair, real) for part, pair in zip(self.local, pairs, strict=True))
        glu, crossed = whole.sigmoid() * whole, z * self._crossed(whole, call.padding)
        views = [whole, two, fast, whole_mixed, one, glu, three, whole_channels, four, crossed]
        output = F.gelu(standardise(self.out_proj(torch.cat(views, -1)), real)) + self.bias
        return Result(output.masked_fill(~real, 0.0))

    def _crossed(self, maps: Tensor, real: Tensor | None) -> Tensor:
        """The gate of every cell and channel, made of maps [b, h, w, e]."""
        by_channel = _by_channels(self.crossed_channels, cell_mean(maps, real))
        places = self.crossed_places()[: maps.shape[1], : maps.shape[2]]
        by_place = places * widen(maps).mean(-1, keepdim=True).square()
        return (by_place * by_channel).sigmoid().to(maps.dtype)


def _product(rows: Tensor, maps: Tensor) -> Tensor:
    """Per channel rows maps as matrices, of which the smaller side's are all that meet: [b, h, w, e]."""
    both = min(rows.shape[1:3])
    return torch.einsum("bhve,bvwe->bhwe", rows[:, :, :both], maps[:, :both])
