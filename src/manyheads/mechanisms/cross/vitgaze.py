"""The interaction encoder of ViTGaze."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.finite import blanked
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class ViTGaze(Mechanism):
    """Where a person looks, read off what the patches of the head attend to in a vision transformer's own maps.

        g = softmax over patches q with m_q > 0 of m_q w . relu(x_q);   I_l = sum_q g_q A_l[q]

    x: [b, n, dim], a patch embedding of the image for this alone. maps: A [b, layers heads, n, n], weights of `layers`
    layers of the transformer, without its special tokens. head: m [b, n], the largest value in each patch of the
    head's mask (1 within its box); where no patch has any, g is even. The result is I, [b, n, layers heads]: a small
    decoder makes the heat map of it. `guidance` gives g, whose mean of the patches' features tells in or out of sight.

    Source: Song et al., ViTGaze, arXiv:2403.12778, and its released PatchPAM; its decoder of convolutions is not here.
    Padded patches are in no sum; in the released code there are none.
    Weights: patch_embed makes x; conv is embed.
    """

    card = Card(
        name="vitgaze",
        title="ViTGaze: Gaze Following with Interaction Features in Vision Transformers",
        reference="arXiv:2403.12778",
        family=Family.CROSS,
        patterns={"noncausal-self"},
        time="n^2",
        state="",
        decodes=False,
        takes={
            "maps": "[b, layers heads, n, n] floats, attention weights of a transformer",
            "head": "[b, n] floats, how much of each patch is the person's head",
        },
        example={"layers": 2},
        notes="reads the weights of another model; the result has layers * heads features",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, layers: int = 1, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        if layers < 1:
            raise ValueError(f"vitgaze: layers={layers}; want at least one layer's maps")
        self.result_dim = layers * heads
        self.conv = nn.Linear(dim, 1, bias=bias)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        place = torch.arange(n)
        maps = torch.arange(self.result_dim or 0)[:, None, None] + 3 * place[:, None] + 5 * place
        return {"maps": (0.7 * maps).sin()[None] + 1, "head": ((place % 4 != 2) * (1.0 - place % 3 * 0.25))[None]}

    def guidance(self, x: Tensor, head: Tensor, real: Tensor | None = None) -> Tensor:
        """g [b, n]."""
        logits = self.conv(x.relu())[..., 0] * head.to(x.dtype)
        shown = torch.ones_like(head, dtype=torch.bool) if real is None else real
        inside = shown & (head > 0)
        inside = torch.where(inside.any(-1, keepdim=True), inside, shown)
        # Without any patch of the head all have the same logit.
        return masked_softmax(logits * (head > 0), inside)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError("vitgaze: a dense mask says nothing here: the maps are given; want key padding")
        maps, head = self._checked(x, call.inputs)
        if call.padding is not None:
            x = blanked(x, ~call.padding)
        g = self.guidance(x, head, call.padding)
        features = torch.einsum("bq,blqk->bkl", g, maps.to(g.dtype))
        return Result(features if call.padding is None else blanked(features, ~call.padding))

    def _checked(self, x: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        for what, shape in (("maps", (b, self.result_dim, n, n)), ("head", (b, n))):
            given = inputs[what]
            fits = isinstance(given, Tensor) and given.is_floating_point() and given.device == x.device
            if not fits or tuple(given.shape) != shape:
                found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"vitgaze: {what} is {found}; want floats {[*shape]} on {x.device}")
        return inputs["maps"], inputs["head"]
