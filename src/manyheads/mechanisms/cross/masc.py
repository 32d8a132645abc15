"""MASC, masked attention for spatial convolutions: a text moves what a map holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

TAPS = 3


@register
class MASC(Mechanism):
    """Each step reads from the text where to go, and moves the map that way by a 3 x 3 convolution masked by it.

        E_0 = x;   E_(t+1) = conv(E_t, softmax(W_a msg_t) * W);   y = sum over t of sigmoid(g_t) E_t, t = 0 .. steps
        msg_t = sum_j softmax_j(c_t . h_j) h_j,   c_(t+1) = W_c [c_t ; msg_t],   c_0 learned

    x: the map [b, height, width, dim]; context: the text's states h [b, m, dim], with key padding as the mask. The mask
    of a step is one 3 x 3 softmax per image, in the order of a cross-correlation, over a kernel W that all steps and
    images share. moves [b]: an image takes so many steps, and its later maps are zeros; all of them by default. heads
    has no meaning here and changes nothing. There are no weights from cells to tokens; `masks` gives the softmaxes.

    Source: de Vries et al., Talk the Walk: Navigating New York City through Grounded Dialogue, arXiv:1807.03367, and
    the released MASC, ControlStep and GuideLanguage, which draws moves from a distribution that it predicts. The paper
    shifts by the mask alone; the code, followed here, masks a learned kernel.
    Weights: conv_weight has the released name and shape; action_linear_fn is action, act_control_emb control,
    act_control_step_fn.control_updater update, and landmark_write_gate.t is gates[t].
    """

    card = Card(
        name="masc",
        title="Talk the Walk: Navigating New York City through Grounded Dialogue",
        reference="arXiv:1807.03367",
        family=Family.CROSS,
        patterns={"grid-cross"},
        time="steps (height width + m)",
        state="",
        decodes=False,
        example={"steps": 2},
        takes={"moves": "optional: [batch] integers, how many of the steps each image takes"},
        notes="an image's map moved by what a text says",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, steps: int = 3) -> None:
        super().__init__(dim, heads, causal=causal)
        if steps < 1:
            raise ValueError(f"masc: steps={steps}; want at least one")
        self.steps = steps
        bound = 1 / (dim * TAPS * TAPS)
        self.conv_weight = nn.Parameter(torch.empty(dim, dim, TAPS, TAPS).uniform_(-bound, bound))
        self.action, self.update = nn.Linear(dim, TAPS * TAPS), nn.Linear(2 * dim, dim)
        self.control = nn.Parameter(0.1 * torch.randn(dim))
        self.gates = nn.Parameter(0.1 * torch.randn(steps + 1, dim))

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"moves": torch.tensor([self.steps])}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        moves = call.inputs.get("moves")
        if moves is not None and (moves.shape != x.shape[:1] or moves.is_floating_point()):
            raise ValueError(
                f"masc: moves have shape {tuple(moves.shape)} and dtype {moves.dtype}; want integers [{len(x)}]"
            )
        gates = self.gates.sigmoid()
        summed = x * gates[0]
        for step, mask in enumerate(self.masks(context, mask=call.padding)):
            x = self._move(x, mask)
            if moves is not None:
                x = x.masked_fill((moves <= step)[:, None, None, None], 0.0)
            summed = summed + x * gates[step + 1]
        return Result(summed)

    def masks(self, context: Tensor, *, mask: Tensor | None = None) -> list[Tensor]:
        """The text [b, m, dim], its key padding [b, m] -> for each step softmax(W_a msg), [b, 3, 3]."""
        control, found = self.control.to(context.dtype).expand(len(context), -1), []
        for _ in range(self.steps):
            scores = (context @ control[..., None])[..., 0]
            message = (masked_softmax(scores, mask)[:, None] @ context)[:, 0]
            control = self.update(torch.cat([control, message], -1))
            found.append(self.action(message).softmax(-1).unflatten(-1, (TAPS, TAPS)))
        # The control behind the last step is read by nobody.
        return found

    def _move(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [b, h, w, e], one kernel per image."""
        kernels = mask[:, None, None] * self.conv_weight
        planes = x.permute(0, 3, 1, 2).flatten(0, 1)[None]
        moved = F.conv2d(planes, kernels.flatten(0, 1).to(planes.dtype), padding=TAPS // 2, groups=len(x))
        return moved[0].unflatten(0, (len(x), -1)).permute(0, 2, 3, 1)
