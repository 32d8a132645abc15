"""Deep orthogonal fusion of local and global features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, convolve, shown
from manyheads.functional.feature_maps import cell_mean
from manyheads.functional.precision import own_dtype, unit
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class DOLG(Mechanism):
    """An image's descriptor: its global vector, and what of its local features that does not say already.

        u = norm(W_1 atrous(x)),   l = (u / |u|) softplus(w relu(u) + c)       per cell
        g = W_t gem(z),  gem(z) = mean(max(z, 1e-6)^power)^(1/power)
        o = l - (g.l / |g|^2) g,   y = W [g ; mean(o)]

    Maps: x [b, height, width, dim], of the last stage but one, and z [b, h, w, global_dim], of the last (2 dim by
    default); y [b, 1, 1, out]. Means are over real cells. atrous: [x's mean ; W x ; dilated 3x3 convolutions of x],
    each of dim / 2 features, then a linear layer to dim and ReLU; an empty list leaves it out. Norm: batch norm, over
    real cells.

    Source: Yang et al., DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of Local and Global Features,
    arXiv:2108.02927, whose figure has the atrous convolutions, and its released dolg_model.py, which leaves them out of
    the pass. There power is not learnt. The ArcFace loss is outside.
    Weights: localmodel.conv1, bn and conv2 are local, norm and score, fc_t project and fc out.
    """

    card = Card(
        name="dolg",
        title="DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of Local and Global Features",
        reference="arXiv:2108.02927",
        family=Family.GRID,
        patterns={"maps"},
        time="n",
        state="",
        decodes=False,
        example={"atrous": [2, 3]},
        notes="Gives one cell, the descriptor of an image; heads are not used.",
    )

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        causal: bool = False,
        global_dim: int | None = None,
        out: int | None = None,
        atrous: Sequence[int] = (6, 12, 18),
        power: float = 3.0,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        global_dim, out = global_dim or 2 * dim, out or max(dim // 2, 1)
        if power <= 0 or any(step < 1 for step in atrous) or min(global_dim, out) < 1:
            raise ValueError(
                f"dolg: power={power}, atrous={atrous}, global_dim={global_dim}, out={out}; want all of them positive"
            )
        self.map_dims, self.result_dim, self.power = (dim, global_dim), out, power
        half, self.atrous = max(dim // 2, 1), len(atrous) > 0
        if self.atrous:
            self.pooled, self.pointwise = nn.Linear(dim, half), nn.Linear(dim, half)
            self.dilated = nn.ModuleList(nn.Conv2d(dim, half, 3, padding=s, dilation=s) for s in atrous)
            self.joined = nn.Linear((2 + len(atrous)) * half, dim)
        self.local, self.norm, self.score = nn.Linear(dim, dim), CellNorm(dim), nn.Linear(dim, 1)
        self.project, self.out = nn.Linear(global_dim, dim), nn.Linear(2 * dim, out)

    def result_size(self, *size: Any) -> Any:
        return (1, 1)

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        fine, coarse = x
        real, real_coarse = (None, None) if call.padding is None else call.padding
        if self.atrous:
            pooled = F.relu(self.pooled(cell_mean(fine, real)))[:, None, None]
            parts = [pooled.expand(*fine.shape[:-1], -1), self.pointwise(fine)]
            parts += [convolve(layer, fine, real) for layer in self.dilated]
            fine = F.relu(self.joined(torch.cat(parts, -1)))
        u = self.norm(self.local(fine), real)
        local = unit(u) * F.softplus(self.score(F.relu(u)))
        g = self.project(self._generalised_mean(coarse, real_coarse))
        length = g.square().sum(-1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
        mean = cell_mean(local, real)  # to be orthogonal to g is linear: the mean's is the mean of all cells'
        rest = mean - (mean * g).sum(-1, keepdim=True) / length * g
        return Result(self.out(torch.cat([g, rest.to(g.dtype)], -1))[:, None, None])

    def _generalised_mean(self, z: Tensor, real: Tensor | None) -> Tensor:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        with own_dtype(wide):
            mean = cell_mean(shown(wide.clamp_min(1e-6).pow(self.power), real), real)
            return mean.clamp_min(1e-6**self.power).pow(1 / self.power).to(z.dtype)
