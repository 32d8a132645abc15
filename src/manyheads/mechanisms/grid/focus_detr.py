"""Foreground scores and dual attention, of Focus-DETR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.functional.precision import own_dtype
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _Predictor(nn.Module):
    """A score per cell of z [b, n, e], half of whose features are those of all cells in the mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.to_half, self.to_quarter, self.to_score = (
            nn.Linear(dim, dim // 2),
            nn.Linear(dim // 2, dim // 4),
            nn.Linear(dim // 4, 1),
        )

    def forward(self, z: Tensor, real: Tensor) -> Tensor:
        own, shared = F.gelu(self.read(self.norm(z))).chunk(2, -1)
        share = (real / real.sum(1, keepdim=True).clamp(min=1)).to(shared.dtype)
        mean = (share[:, None] @ shared).expand_as(own)
        h = F.gelu(self.to_half(torch.cat([own, mean], -1)))
        return self.to_score(F.gelu(self.to_quarter(h)))[..., 0]


@register
class FocusDETR(Mechanism):
    """Scores say which cells of several maps show an object at all; the best of these, by class, attend to each other.

        m_l = LN(W (x_l + p_l));  s_l = predictor(m_l + alpha_l m_l up(s_(l+1))), the coarsest map first, and without up
        kept: the int(ratio real cells) + 1 of largest s over all maps;  c_i = max over classes of (W_c x_i) s_i
        x_i <- LN(x_i + MHA(x + p, x + p, x)) among the `objects` kept ones of largest c; others stay as they are

    x: `levels` maps [b, h, w, dim], the finest first. The result is three tuples in one: the maps, the scores
    [b, h, w, 1] and the classes' logits [b, h, w, classes], to be trained against boxes. up: bilinear, corners on
    corners. places: p, [b, cells of all maps in order, dim]. Padded cells are never kept and in no mean.

    Source: Zheng et al., Less is More: Focus Attention for Efficient DETR, arXiv:2307.12612, and its released code,
    where the product is of raw logits too (of two negative ones it is large), and padded cells are in the mean. The
    deformable attention that follows, whose queries are the kept cells, is not here, nor dropout.
    Weights: enc_output, enc_output_norm are memory, memory_norm; enc_mask_predictor layer1.0, layer1.1, layer2.0,
    layer2.2, layer2.4 are predictor.norm, read, to_half, to_quarter, to_score; alpha begins at the second coarsest map.
    """

    card = Card(
        name="focus-detr",
        title="Less is More: Focus Attention for Efficient DETR",
        reference="arXiv:2307.12612",
        family=Family.GRID,
        patterns={"maps"},
        time="n + objects^2",
        state="",
        decodes=False,
        example={"levels": 3, "objects": 20, "classes": 3},
        takes={"places": "optional [b, cells, dim] floats, encoded places of the cells of all maps"},
        notes="the result holds scores and classes too, which want losses; the choice by them has no gradient",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        levels: int = 4,
        ratio: float = 0.5,
        objects: int = 300,
        classes: int = 8,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if levels < 1 or not 0 < ratio <= 1 or objects < 1 or classes < 1 or dim % 4:
            raise ValueError(
                f"focus-detr: dim={dim}, levels={levels}, ratio={ratio}, objects={objects}, classes={classes}; want a "
                "dim in fours, positive sizes, and 0 < ratio <= 1"
            )
        self.map_dims, self.ratio, self.objects = (dim,) * levels, ratio, objects
        self.memory, self.memory_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.predictor, self.classes = _Predictor(dim), nn.Linear(dim, classes)
        self.alpha = nn.Parameter(torch.empty(levels - 1).uniform_(-0.3, 0.3)) if levels > 1 else None
        self.attention, self.norm = Heads(dim, heads, bias), nn.LayerNorm(dim)

    def result_size(self, *size: Any) -> Any:
        return size * 3

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        sizes = [one.shape[1:3] for one in x]
        cells = torch.cat([one.flatten(1, 2) for one in x], 1)
        real = torch.ones_like(cells[..., 0], dtype=torch.bool)
        if call.padding is not None:
            real = torch.cat([part.flatten(1) for part in call.padding], 1)
        places = self._places(cells, call.inputs)
        scores, logits = self._scores(cells + places, sizes, real), self.classes(cells)
        updated, weights = self._among_objects(cells, places, scores * logits.amax(-1), scores, real)
        lengths = [height * width for height, width in sizes]
        outputs = [
            part.unflatten(1, tuple(size))
            for whole in (updated, scores[..., None], logits)
            for part, size in zip(whole.split(lengths, 1), sizes, strict=True)
        ]
        return Result(tuple(outputs), weights if call.need_weights else None)

    def _scores(self, cells: Tensor, sizes: list[Any], real: Tensor) -> Tensor:
        """s [b, n]."""
        lengths = [height * width for height, width in sizes]
        memory = self.memory_norm(self.memory(cells.masked_fill(~real[..., None], 0.0)))
        parts: list[Tensor] = []
        levels = zip(memory.split(lengths, 1), real.split(lengths, 1), sizes, strict=True)
        for step, (level, shown, size) in enumerate(reversed(list(levels))):
            if parts and self.alpha is not None:
                level = level + level * self.alpha[step - 1] * _upsampled(parts[0], sizes[-step], size)
            parts.insert(0, self.predictor(level, shown).masked_fill(~shown, 0.0))
        return torch.cat(parts, 1)

    def _among_objects(
        self, cells: Tensor, places: Any, value: Tensor, scores: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        wanted = (real.sum(1, keepdim=True) * self.ratio).int() + 1
        best = scores.detach().masked_fill(~real, -torch.inf).argsort(stable=True, dim=1, descending=True)
        rank = torch.empty_like(best).scatter(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
        kept = (rank < wanted) & real
        order = value.detach().masked_fill(~kept, -torch.inf).argsort(stable=True, dim=1, descending=True)
        chosen = order[:, : self.objects]
        shown, rows = kept.gather(1, chosen), chosen[..., None].expand(-1, -1, cells.shape[2])
        found = cells.gather(1, rows)
        placed = found if isinstance(places, float) else found + places.gather(1, rows)
        heads = self.attention
        k, v = heads.split(heads.k_proj(placed)), heads.split(heads.v_proj(found))
        mixed, weights = heads(placed, k, v, key_mask(shown), True)
        after = torch.where(shown[..., None], self.norm(found + mixed).to(cells.dtype), found)
        return cells.scatter(1, rows, after), weights

    def _places(self, cells: Tensor, inputs: Mapping[str, Any]) -> Any:
        places = inputs.get("places")
        if places is None:
            return 0.0
        fits = isinstance(places, Tensor) and places.is_floating_point() and places.device == cells.device
        if not fits or places.shape != cells.shape:
            given = list(places.shape) if isinstance(places, Tensor) else type(places).__name__
            raise ValueError(f"focus-detr: places are {given}; want floats {list(cells.shape)} on {cells.device}")
        return places.to(cells.dtype)


def _upsampled(scores: Tensor, before: Any, after: Any) -> Tensor:
    """[b, cells before] -> [b, cells after, 1], at least in float32 on the way."""
    with own_dtype(scores):
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(1, tuple(before))[:, None]
        grown = F.interpolate(wide, size=tuple(after), mode="bilinear", align_corners=True)
    return grown.flatten(1)[..., None].to(scores.dtype)
