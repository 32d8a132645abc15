"""Entity-and-relation aware attention, of TransRefer3D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.multihead import Heads, key_mask
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

PAIRS = 1 << 12  # pairs of objects whose queries stand in memory at once


@register
class EntityRelation(Mechanism):
    """Objects look for words that name them, and pairs of objects for words that say how the two stand.

        e_a = MHA_1(o_a, w, w);  r_a = max_b MHA_2(o_a - o_b, w, w), per feature, over all objects b, a among them
        x_n = LN(o + e), x_e = LN(o + r);  y = LN(x_n + W_2 relu(W_1 [x_n ; x_e]))

    x: objects o [b, n, dim]; context: words w [b, m, dim], whose padding the mask hides. objects: [b, n] booleans,
    which objects are real: others are in no maximum (in the released code they are). Dense masks are of the first
    attention alone, and so refused. The result is y, residuals and norms included. Matrix: those of MHA_1. Time
    n^2 m, memory too where gradients are wanted.

    Source: He et al., TransRefer3D, arXiv:2108.02388, and its released ObjEdgeGaModule, without dropout; `hidden` is
    dim there.
    Weights: msa_node, msa_edge are entity, relation; normq, norme, norm2 are norm_entity, norm_relation, norm_out.
    """

    card = Card(
        name="entity-relation",
        title="TransRefer3D: Entity-and-Relation Aware Transformer for Fine-Grained 3D Visual Grounding",
        reference="arXiv:2108.02388",
        family=Family.CROSS,
        patterns={"noncausal-cross"},
        time="n^2 m",
        state="",
        decodes=False,
        takes={"objects": "optional [b, n] booleans, which objects are real"},
        notes="residuals, norms and the feed-forward layer are inside",
    )

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, hidden: int | None = None, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        hidden = dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"entity-relation: hidden={hidden}; want the width of the feed-forward layer, at least 1")
        self.entity, self.relation = Heads(dim, heads, bias), Heads(dim, heads, bias)
        self.up, self.down = nn.Linear(2 * dim, hidden), nn.Linear(hidden, dim)
        self.norm_entity, self.norm_relation, self.norm_out = (nn.LayerNorm(dim) for _ in range(3))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError("entity-relation: a dense mask says nothing on pairs of objects; give the words' padding")
        objects = self._checked(x, call.inputs.get("objects"))
        allowed = key_mask(call.padding)
        entity, weights = self.entity(x, *self.entity.read(context), allowed, call.need_weights)
        named = self.norm_entity(x + entity)
        related = self.norm_relation(x + self._relations(x, context, allowed, objects))
        both = torch.cat([named, related], -1)
        return Result(self.norm_out(named + self.down(self.up(both).relu())), weights)

    def _relations(self, x: Tensor, context: Tensor, allowed: Tensor | None, objects: Tensor | None) -> Tensor:
        """r [b, n, e], for some of the first objects of the pairs at a time."""
        (k, v), n, parts = self.relation.read(context), x.shape[1], []
        size = max(PAIRS // n, 1)
        for start in range(0, n, size):
            pairs = (x[:, start : start + size, None] - x[:, None]).flatten(1, 2)
            seen = self.relation(pairs, k, v, allowed, False)[0].unflatten(1, (-1, n))
            if objects is not None:
                seen = seen.masked_fill(~objects[:, None, :, None], torch.finfo(seen.dtype).min)
            parts.append(seen.amax(2))
        together = torch.cat(parts, 1)
        return together if objects is None else together.masked_fill(~objects.any(1)[:, None, None], 0.0)

    def _checked(self, x: Tensor, objects: Any) -> Tensor | None:
        if objects is None:
            return None
        fits = isinstance(objects, Tensor) and objects.dtype == torch.bool and objects.device == x.device
        if not fits or objects.shape != x.shape[:2]:
            given = f"{objects.dtype} {list(objects.shape)}" if isinstance(objects, Tensor) else repr(objects)[:80]
            raise ValueError(f"entity-relation: objects are {given}; want booleans {list(x.shape[:2])} on {x.device}")
        return objects
