"""Click attention, of AGILE3D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class Agile3D(Mechanism):
    """Clicks on objects read the points of a scene and each other, then the points read the clicks.

        q' = LN(q + MHA(q + p_q, s + p_s, s; points last seen as the click's object))     click to scene
        q'' = LN(q' + MHA(q' + p_q, q' + p_q, q'));  q* = LN(q'' + W_2 relu(W_1 q''))       click to click
        s* = LN(s + MHA(s + p_s, q* + p_q, q*))                                             scene to click

    x: two maps, the clicks [b, h, w, dim] and the points [b, h', w', dim], in whatever shape they are counted; the
    result is (q*, s*), residuals and norms included. objects: [b, h, w] integers, whose click it is, 0 the background;
    seen: [b, h', w'] integers, as whose part a point was last seen, the largest of `object_logits`. Without both, in
    the first round, clicks see all points; so does one of whose object no point was seen. places, seen_from: p_q, p_s.

    Source: Yue et al., AGILE3D, arXiv:2306.00977, and its released layers, without dropout, scene by scene there. Its
    learned background queries are clicks of object 0 that the model adds.
    Weights: multihead_attn.in_proj of c2s_attention, s2c_attention and self_attn.in_proj of c2c_attention are q, k, v
    of to_scene, to_clicks, between; ffn_attention linear1, linear2 are up, down; each has its norm.
    """

    card = Card(
        name="agile3d",
        title="AGILE3D: Attention Guided Interactive Multi-object 3D Segmentation",
        reference="arXiv:2306.00977",
        family=Family.CROSS,
        patterns={"maps"},
        time="clicks (clicks + points)",
        state="",
        decodes=False,
        takes={
            "objects": "optional [b, h, w] integers, the object of each click, with seen",
            "seen": "optional [b, h', w'] integers, the object that each point was last seen as, with objects",
            "places": "optional [b, h, w, dim] floats, encoded places of clicks",
            "seen_from": "optional [b, h', w', dim] floats, encoded places of points",
        },
        notes="two maps: clicks and points; residuals, norms and the feed-forward layer are inside",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, hidden: int | None = None, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        hidden = 8 * dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"agile3d: hidden={hidden}; want the width of the feed-forward layer, at least 1")
        self.map_dims = (dim, dim)
        self.to_scene, self.between, self.to_clicks = (Heads(dim, heads, bias) for _ in range(3))
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm_scene, self.norm_between, self.norm_up, self.norm_clicks = (nn.LayerNorm(dim) for _ in range(4))

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        clicks, points = (one.flatten(1, 2) for one in x)
        real_clicks, real_points = (None, None) if call.padding is None else (p.flatten(1) for p in call.padding)
        at_clicks = self._checked("places", x[0], call.inputs, x[0].shape, True)
        at_points = self._checked("seen_from", x[1], call.inputs, x[1].shape, True)
        allowed = self._own_points(x, call.inputs, key_mask(real_points))
        mixed, weights = _read(self.to_scene, clicks, at_clicks, points, at_points, allowed, call.need_weights)
        q = self.norm_scene(clicks + mixed)
        q = self.norm_between(q + _read(self.between, q, at_clicks, q, at_clicks, key_mask(real_clicks))[0])
        q = self.norm_up(q + self.down(self.up(q).relu()))
        read, _ = _read(self.to_clicks, points, at_points, q, at_clicks, key_mask(real_clicks))
        s = self.norm_clicks(points + read)
        return Result((q.view_as(x[0]), s.view_as(x[1])), weights)

    def _own_points(self, x: Any, inputs: Mapping[str, Any], real: Tensor | None) -> Tensor | None:
        """Which points each click sees, [b, 1, clicks, points]."""
        objects = self._checked("objects", x[0], inputs, x[0].shape[:3], False)
        seen = self._checked("seen", x[1], inputs, x[1].shape[:3], False)
        if objects is None or seen is None:
            if objects is not seen:
                raise ValueError("agile3d: objects and seen say together what a click sees; give both or none")
            return real
        own = (objects[:, :, None] == seen[:, None])[:, None]
        own = own if real is None else own & real
        opened = own | ~own.any(-1, keepdim=True)
        return opened if real is None else opened & real

    def _checked(self, what: str, one: Tensor, inputs: Mapping[str, Any], shape: Any, floats: bool) -> Any:
        given = inputs.get(what)
        if given is None:
            return None
        fits = isinstance(given, Tensor) and given.shape == shape and given.device == one.device
        if not fits or given.is_floating_point() != floats or given.dtype == torch.bool:
            found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            kind = "floats" if floats else "integers"
            raise ValueError(f"agile3d: {what} is {found}; want {kind} {[*shape]} on {one.device}")
        return given.flatten(1, 2)


def _read(
    heads: Heads,
    x: Tensor,
    at_x: Tensor | None,
    source: Tensor,
    at_source: Tensor | None,
    allowed: Tensor | None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose places are in queries and keys, and not in values."""
    k = heads.split(heads.k_proj(source if at_source is None else source + at_source.to(source.dtype)))
    query = x if at_x is None else x + at_x.to(x.dtype)
    return heads(query, k, heads.split(heads.v_proj(source)), allowed, need_weights)


def object_logits(points: Tensor, clicks: Tensor, objects: Tensor, count: int) -> Tensor:
    """How much each point looks like part of each object: the largest of its products with the object's clicks.

    points [b, n, e], clicks [b, m, e] (behind a norm and a small network of the model's), objects [b, m] integers, the
    background 0 -> [b, n, count]; -inf for an object without a click. Below 0: no click (padding).
    """
    if objects.shape != clicks.shape[:2] or int(objects.max()) >= count:
        raise ValueError(
            f"object_logits: objects {list(objects.shape)} up to {int(objects.max())} for clicks "
            f"{list(clicks.shape[:2])}; want one for each click, below count={count}"
        )
    products = points @ clicks.mT
    of = [products.masked_fill((objects != one)[:, None], -torch.inf).amax(-1) for one in range(count)]
    return torch.stack(of, -1)
