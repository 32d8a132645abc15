"""Mechanisms for grids and graphs: windows against dense masked attention, convolutions against the same ones written
by hand, exponents over the image's cells, and edges against message passing.

Windows: the dense side is scaled_dot_product_attention over all cells with the mask that says who sees whom, and the
same projections. largest: elements of the largest tensor that any operator of ours returned, beside the cells squared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import device_argument, exponent, keep_pages, once, pair, peak_bytes, save
from manyheads import create_attention
from manyheads.functional.edges import sample_edges, sample_two_hops
from manyheads.testing import LargestTensor

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/functional/grid_windows.py",
    "src/manyheads/functional/grid_extents.py",
    "src/manyheads/functional/grid_bias.py",
    "src/manyheads/functional/cells.py",
    "src/manyheads/functional/grid_scans.py",
    "src/manyheads/functional/edges.py",
    "src/manyheads/mechanisms/grid",
    "src/manyheads/mechanisms/convolution",
    "src/manyheads/mechanisms/graph",
    "src/manyheads/mechanisms/recurrent/vision_rwkv.py",
    "src/manyheads/mechanisms/recurrent/vfimamba.py",
    "src/manyheads/mechanisms/selection/neighborhood_grid.py",
)

SIDE, DIM, HEADS = 64, 64, 2
SIDES = [32, 64, 128, 256]
SCANS = ("vision-rwkv", "lamamba", "vfimamba")
EDGE_HEADS = 4


def _near(window: int, dilation: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Along one axis: the `window` cells of the same phase around a cell, moved inwards at the rim."""

    def sees(i: Tensor, j: Tensor) -> Tensor:
        phase, place, key = i % dilation, i // dilation, j // dilation
        length = -(-(SIDE - phase) // dilation)
        first = torch.minimum((place - window // 2).clamp(min=0), (length - window).clamp(min=0))
        return (j % dilation == phase) & (key >= first) & (key < first + window)

    return sees


def _block(size: int, halo: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: (j >= i // size * size - halo) & (j < i // size * size + size + halo)


def _spread(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: i % (SIDE // size) == j % (SIDE // size)


WINDOWS: list[tuple[str, dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = [
    ("neighborhood-grid", {"window": 7}, _near(7, 1)),
    ("neighborhood-grid", {"window": 7, "dilation": 2}, _near(7, 2)),
    ("halonet", {"block": 8, "halo": 3}, _block(8, 3)),
    ("twins-local", {"window": 8}, _block(8)),
    ("maxvit-block", {"window": 8}, _block(8)),
    ("maxvit-grid", {"window": 8}, _spread(8)),
]


def windows(device: str) -> list[dict[str, Any]]:
    rows, axis = [], torch.arange(SIDE, device=device)
    x, dense = torch.randn(1, SIDE, SIDE, DIM, device=device), nn.Linear(DIM, 4 * DIM).to(device)
    for name, config, sees in WINDOWS:
        module = create_attention(name, DIM, HEADS, **config).to(device).eval()
        along = sees(axis[:, None], axis[None, :])
        mask = (along[:, None, :, None] & along[None, :, None, :]).reshape(SIDE**2, SIDE**2)
        if name == "neighborhood-grid":
            _same_places(module, x, mask)

        def masked(mask: Tensor = mask) -> Tensor:
            q, k, v, out = dense(x).flatten(1, 2).unflatten(-1, (4, HEADS, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, mask) + out

        with torch.no_grad():
            with LargestTensor() as largest:
                module(x)
            found = pair(lambda: module(x), masked, rounds=7, device=device)  # noqa: B023
        rows.append(
            {"what": "windows", "mechanism": name, **config, **found, "target": 1 / 8}
            | {"largest": largest.size, "cells_squared": SIDE**4}
        )
    return rows


def _same_places(module: nn.Module, x: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        weights = module(x, need_weights=True).weights
    assert torch.equal(weights[0, 0] > 0, mask), "the dense side sees other cells"


class _Focal(nn.Module):
    """Focal modulation's own layers with features first, as its released code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.h, self.proj = nn.Linear(DIM, 2 * DIM + 3), nn.Conv2d(DIM, DIM, 1), nn.Linear(DIM, DIM)
        self.convs = nn.ModuleList(nn.Conv2d(DIM, DIM, k, padding=k // 2, groups=DIM, bias=False) for k in (3, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, z, gates = self.f(x).permute(0, 3, 1, 2).split((DIM, DIM, 3), 1)
        total = torch.zeros_like(z)
        for level, conv in enumerate(self.convs):
            z = F.gelu(conv(z))
            total = total + z * gates[:, level, None]
        total = total + F.gelu(z.mean((2, 3), keepdim=True)) * gates[:, 2, None]
        return self.proj((q * self.h(total)).permute(0, 2, 3, 1))


class _LargeKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.point = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))
        self.near = nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM)
        self.far = nn.Conv2d(DIM, DIM, 7, padding=9, dilation=3, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        first = x.permute(0, 3, 1, 2)
        u = F.gelu(self.one(first))
        return (first + self.two(u * self.point(self.far(self.near(u))))).permute(0, 2, 3, 1)


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = int(8 / 3 * DIM)
        self.widths = (hidden, hidden - DIM, DIM)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(DIM, eps=1e-6), nn.Linear(DIM, 2 * hidden), nn.Linear(hidden, DIM)
        self.conv = nn.Conv2d(DIM, DIM, 7, padding=3, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        g, i, v = self.fc1(self.norm(x)).split(self.widths, -1)
        v = self.conv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.fc2(F.gelu(g) * torch.cat([i, v], -1))


def convolutions(device: str) -> list[dict[str, Any]]:
    rows, x = [], torch.randn(1, SIDE, SIDE, DIM, device=device)
    by_hand = {"focal-modulation": _Focal, "large-kernel-attention": _LargeKernel, "mambaout": _Gated}
    for name, theirs in by_hand.items():
        module, other = create_attention(name, DIM, 1).to(device).eval(), theirs().to(device).eval()
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in other.parameters())
        with torch.no_grad():
            found = pair(lambda: module(x), lambda: other(x), device=device)  # noqa: B023
        rows.append({"what": "by hand", "mechanism": name, **found, "target": 1.1})
    return rows


def exponents(device: str) -> list[dict[str, Any]]:
    rows = []
    cards = ("focal-modulation", "large-kernel-attention", "mambaout", "spectformer", "twins-local")
    for name in (*cards, "davit-channel", "efficient-local-attention", *SCANS):
        sides = SIDES[:3] if name in ("lamamba", "vfimamba") else SIDES  # their states are 16 times as large as a map
        module = create_attention(name, 32, 1 if "local-a" in name or "focal" in name else 2).to(device).eval()
        seconds = []
        with torch.no_grad():
            for side in sides:
                deep = (2,) if name == "vfimamba" else ()
                x = torch.randn(1, *deep, side, side, 32, device=device)
                module(x)
                seconds.append(min(once(lambda: module(x), device) for _ in range(5)))  # noqa: B023
        cells = [side**2 for side in sides]
        target = 1.1 if name in SCANS else 1.15
        rows.append(
            {"what": "exponent over cells", "mechanism": name, "exponent": exponent(cells, seconds), "target": target}
            | {f"ms_at_{side}": 1e3 * s for side, s in zip(sides, seconds, strict=True)}
        )
    return rows


class _Gathered(nn.Module):
    """SuperGAT as message passing has it: the features of both ends of every edge side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(DIM, DIM, bias=False)
        self.att_l, self.att_r = (nn.Parameter(torch.randn(EDGE_HEADS, DIM // EDGE_HEADS)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        n = len(x)
        nodes = self.lin(x).unflatten(-1, (EDGE_HEADS, -1))
        edges = torch.cat([edges[:, edges[0] != edges[1]], torch.arange(n, device=x.device).expand(2, -1)], 1)
        sources, targets = nodes[edges[0]], nodes[edges[1]]
        likely = (sources * targets).sum(-1).sigmoid()
        scores = F.leaky_relu(((sources * self.att_l).sum(-1) + (targets * self.att_r).sum(-1)) * likely, 0.2)
        place = edges[1][:, None].expand_as(scores)
        highest = scores.new_full((n, EDGE_HEADS), -torch.inf).scatter_reduce(0, place, scores, "amax")
        parts = (scores - highest[edges[1]]).exp()
        total = parts.new_zeros(n, EDGE_HEADS).index_add(0, edges[1], parts)
        sent = sources * (parts / total[edges[1]])[..., None]
        return sent.new_zeros(n, DIM).index_add(0, edges[1], sent.flatten(1)) + self.bias


def _geometric() -> nn.Module | None:
    """torch_geometric's, where it is installed (`peers.py --make-env DIR` installs it beside manyheads)."""
    try:
        from torch_geometric.nn import SuperGATConv
    except ImportError:
        return None
    return SuperGATConv(DIM, DIM // EDGE_HEADS, heads=EDGE_HEADS, attention_type="MX")


def graph_pair(peer: str, device: str = "cpu") -> tuple[Callable[[], Tensor], Callable[[], Tensor]] | None:
    """Our pass over a graph of 100,000 edges and that of a peer with the same weights, "by hand" or "geometric"."""
    torch.manual_seed(0)
    nodes, edges = 10_000, torch.randint(10_000, (2, 100_000), device=device)
    x, ours = torch.randn(nodes, DIM, device=device), create_attention("supergat", DIM, EDGE_HEADS).to(device).eval()
    theirs = _Gathered() if peer == "by hand" else _geometric()
    if theirs is None:
        return None
    theirs = theirs.to(device).eval()
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.proj.weight)
        for name in ("att_l", "att_r", "bias"):
            held = getattr(theirs, name)
            held.copy_(getattr(ours, name).view_as(held))
    return lambda: ours(x[None], edges=edges).output[0], lambda: theirs(x, edges)


MEMORY = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
from common import peak_reset, peak_since
from vision import graph_pair
torch.set_num_threads(1)
call = graph_pair(sys.argv[1])[int(sys.argv[2])]
with torch.no_grad():
    base = peak_reset()
    call()
    print(peak_since(base))
"""


def graph_peers(device: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for peer, what in (("by hand", "graph by hand"), ("geometric", "graph peer")):
        sides = graph_pair(peer, device)
        if sides is None:
            continue
        with torch.no_grad():
            torch.testing.assert_close(sides[0](), sides[1](), rtol=1e-4, atol=1e-4)
            found = pair(*sides, device=device)
        rows.append({"what": what, "mechanism": "supergat", "edges": 100_000, **found, "target": 1.0})
        if device == "cpu":
            a, b = (peak_bytes(MEMORY, peer, str(side), str(Path(__file__).parent)) for side in (0, 1))
            rows.append(
                {"what": "graph memory", "mechanism": "supergat", "beside": peer, "bytes": a, "ratio": a / b}
                | {"target": 1.0}
            )
    return rows


def graphs(device: str) -> list[dict[str, Any]]:
    nodes, edges = 10_000, torch.randint(10_000, (2, 100_000), device=device)
    module = create_attention("supergat", DIM, EDGE_HEADS).to(device).eval()
    x = torch.randn(1, nodes, DIM, device=device)
    with torch.no_grad(), LargestTensor() as largest:
        module(x, edges=edges)
    with torch.no_grad():
        seconds = min(once(lambda: module(x, edges=edges), device) for _ in range(5))
    rows: list[dict[str, Any]] = [
        {"what": "graph", "mechanism": "supergat", "edges": 100_000, "ms": 1e3 * seconds, "largest": largest.size}
    ]
    many = torch.randint(100_000, (2, 1_000_000))
    samplers = {
        "sample_edges": lambda: sample_edges(many, 20, seed=0),
        "sample_two_hops": lambda: sample_two_hops(many, 100_000, 20, seed=0),
    }
    for name, sampler in samplers.items():
        rows.append({"what": "sampling", "by": name, "edges": 1_000_000, "seconds": once(sampler), "target": 10.0})
    return rows


def main() -> None:
    device = device_argument()
    keep_pages()
    torch.manual_seed(0)
    edges = [*graph_peers(device), *graphs(device)]
    save("vision", device, [*windows(device), *convolutions(device), *exponents(device), *edges])


if __name__ == "__main__":
    main()
