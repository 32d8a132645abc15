"""Local attention between two modalities, of DeepInteraction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.cells import CellNorm, shown
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _Layers(nn.Module):
    """relu(norm(W x)), once or several times."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(count))
        self.norms = nn.ModuleList(CellNorm(dim) for _ in range(count))

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = shown(F.relu(norm(layer(shown(x, real)), real)), real)
        return x


@register
class DeepInteraction(Mechanism):
    """Each cell of one modality's map attends to those around the same place in the other's.

        y_p = sum over s in the square of window x window around p of softmax_s(q_p.k_s / sqrt(dim)) v_s
        q = f(f(target)),  k = f(f(source)),  v = f(source),   f(x) = relu(norm(W x)), each with weights of its own

    Maps: target, source [b, height, width, dim], warped onto each other; y of the same size. Both directions are two of
    these. One head, no output projection, no residual. A place outside the map, and a padded one, has a key and value
    of zero, and its share of the softmax: as in the released kernel. Since q and k are not negative, no real place gets
    less. Norms: batch norm, over real cells.

    Source: Yang et al., DeepInteraction++: Multi-Modality Interaction for Autonomous Driving, arXiv:2408.05075 and
    arXiv:2208.11112, and the released LocalContextAttentionBlock with its similar.cu and weighting.cu. What is not
    here: warping by depth, and the way from pictures to pillars (each attends to the places of its own points by a
    plain one-head attention).
    Weights: query_project, key_project and value_project, convolutions without their axes of length 1.
    """

    card = Card(
        name="deep-interaction",
        title="DeepInteraction++: Multi-Modality Interaction for Autonomous Driving",
        reference="arXiv:2408.05075",
        family=Family.GRID,
        patterns={"maps"},
        time="n window^2",
        state="",
        decodes=False,
        example={"window": 3},
        notes="Two maps of one size, the first asks; one head whatever is given.",
    )

    def __init__(self, dim: int, heads: int = 1, *, causal: bool = False, window: int = 9) -> None:
        super().__init__(dim, heads, causal=causal)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"deep-interaction: window={window}; want an odd number, as many cells before as behind")
        self.window, self.map_dims = window, (dim, dim)
        self.query, self.key, self.value = _Layers(dim, 2), _Layers(dim, 2), _Layers(dim, 1)

    def result_size(self, *size: Any) -> Any:
        return size[0]

    def map_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        return ((height, width),) * 2

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        target, source = x
        if target.shape != source.shape:
            raise ValueError(
                f"deep-interaction: maps of {list(target.shape)} and {list(source.shape)}; want two of one size"
            )
        real, real_source = (None, None) if call.padding is None else call.padding
        q = self.query(target, real) * self.dim**-0.5
        k, v = (self._around(part(source, real_source)) for part in (self.key, self.value))
        scores = torch.stack([(q * self._shifted(k, s, q)).sum(-1) for s in range(self.window**2)], -1)
        weights = torch.softmax(scores, -1).to(v.dtype)
        mixed = weights[..., :1] * self._shifted(v, 0, q)
        for s in range(1, self.window**2):
            mixed = mixed + weights[..., s : s + 1] * self._shifted(v, s, q)
        return Result(mixed)

    def _around(self, x: Tensor) -> Tensor:
        half = self.window // 2
        return F.pad(x, (0, 0, half, half, half, half))

    def _shifted(self, padded: Tensor, s: int, like: Tensor) -> Tensor:
        """The cells at place s of each square."""
        row, column = divmod(s, self.window)
        return padded[:, row : row + like.shape[1], column : column + like.shape[2]]
