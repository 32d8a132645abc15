"""Group Pose: attention within each person, then across persons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class GroupPose(Mechanism):
    """A row of the grid is a person: its query, then its keypoints. Rows attend within, then columns.

        h_n = LN(x_n + MHA(q, k = x_n + p_n, v = x_n)) over the tokens of person n
        y_:t = LN(h_:t + MHA(h_:t)) over the persons' tokens of the same kind t

    x: [b, persons, 1 + keypoints, dim], the person's own query in column 0; mask: [b, persons, 1 + keypoints]. places:
    p of the keypoints, [b, persons, keypoints, dim]; the person's query has none. The result is y, residuals and norms
    included; cross attention to the image and the feed-forward layer follow outside. No weights: there are two layers.

    Source: Liu et al., Group Pose, arXiv:2308.07313, and its released decoder layer, without dropout. There the
    places are added in place, so that values and residuals hold them too: call it with x + p and no places for that.
    Weights: within_attn.in_proj, across_attn.in_proj are q, k, v of within, across; within_norm, across_norm.
    """

    card = Card(
        name="group-pose",
        title="Group Pose: A Simple Baseline for End-to-End Multi-person Pose Estimation",
        reference="arXiv:2308.07313",
        family=Family.GRID,
        patterns={"grid"},
        time="height width (height + width)",
        state="",
        decodes=False,
        takes={"places": "optional [b, persons, keypoints, dim] floats, of columns 1 on"},
        notes="a row is a person, a column a kind of keypoint; equivariant to the order of persons",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.within, self.across = Heads(dim, heads, bias), Heads(dim, heads, bias)
        self.norm_within, self.norm_across = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        placed = x + self._places(x, call.inputs)
        h = self.norm_within(x + _along(self.within, placed, x, call.padding))
        turned = h.transpose(1, 2)
        real = None if call.padding is None else call.padding.transpose(1, 2)
        return Result(self.norm_across(h + _along(self.across, turned, turned, real).transpose(1, 2)))

    def _places(self, x: Tensor, inputs: Mapping[str, Any]) -> Any:
        places = inputs.get("places")
        if places is None:
            return 0.0
        b, persons, tokens, dim = x.shape
        wanted = (b, persons, tokens - 1, dim)
        fits = isinstance(places, Tensor) and places.is_floating_point() and places.device == x.device
        if not fits or tuple(places.shape) != wanted:
            given = list(places.shape) if isinstance(places, Tensor) else type(places).__name__
            raise ValueError(f"group-pose: places are {given}; want floats {[*wanted]} on {x.device}")
        return pad(places.to(x.dtype), (0, 0, 1, 0))


def _along(heads: Heads, placed: Tensor, values: Tensor, real: Tensor | None) -> Tensor:
    """Attention along the third axis of [b, rows, columns, e], each row for itself."""
    rows, b = placed.flatten(0, 1), len(placed)
    k, v = heads.split(heads.k_proj(rows)), heads.split(heads.v_proj(values.flatten(0, 1)))
    allowed = key_mask(None if real is None else real.flatten(0, 1))
    return heads(rows, k, v, allowed, False)[0].unflatten(0, (b, -1))
