"""Layerwise attention shortcuts: the last layer attends to all layers before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_rows, masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class LayerShortcuts(Mechanism):
    """The last layer's query chooses among tokens and depths: keys are all intermediate layers' outputs at all tokens.

        softmax over j <= i and l of (W_q last_i) . (W_k f_l(h_lj)) / sqrt(d), times W_v f_l(h_lj),  f_l = W gelu(W h)

    earlier [b, n, layers, dim]: h_1 .. h_layers, the outputs of all layers below this one, for the tokens of this pass;
    a model's last layer, under it `layers` others, is given them by the model. x is that layer's own input. f_l: a map
    of its own for each layer. Weights are summed over the layers; `depth_weights` gives them apart, [b, heads, n, n,
    layers]. State: layers keys and values per token.
    Source: Verma, Pilanci, arXiv:2409.10870: the final layer attends to MLP features of all intermediate layers,
    concatenated, under a causal mask. Read from its abstract and summaries, as no code was at hand; that the features
    are joined as keys and not as one wider vector, GELU, and one hidden layer of the same width are choices made here.
    """

    card = Card(
        name="layer-shortcuts",
        title="Adaptive Large Language Models By Layerwise Attention Shortcuts",
        reference="arXiv:2409.10870",
        family=Family.RECURRENT,
        patterns={"causal-self"},
        time="n^2 layers",
        state="n layers",
        example={"layers": 3},
        takes={"earlier": "[b, n, layers, dim], the outputs of all layers below"},
        notes="`layers` is how many layers stand below it: in a model of 12, the last has 11.",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = True, layers: int = 1, bias: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        if layers < 1:
            raise ValueError(f"{self.card.name}: layers={layers}; want at least 1, as many as stand below")
        self.layers, self.head_dim = layers, self._split_heads()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.features = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(layers)
        )

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"earlier": torch.sin(torch.arange(n * self.layers * self.dim) * 0.7).view(1, n, self.layers, self.dim)}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, k, v, padding = self._read(x, call)
        n, m, seen = x.shape[1], k.shape[2] // self.layers, call.seen
        if call.state is not None:
            seen -= n  # the state counts this pass already

        def allowed(rows: slice) -> Tensor:
            i = torch.arange(seen + rows.start, seen + rows.stop, device=x.device)
            found = (torch.arange(m, device=x.device) <= i[:, None])[None, None]
            found = found if padding is None else found & padding[:, None, None]
            found = found if call.dense is None else found & call.dense[:, :, rows]
            return found.repeat_interleave(self.layers, -1)

        scale, weights = self.head_dim**-0.5, None
        if call.need_weights:
            apart = masked_softmax(q @ k.mT * scale, allowed(slice(0, n)))
            mixed, weights = apart @ v, apart.unflatten(-1, (m, self.layers)).sum(-1)
        else:
            mixed = attend_rows(q, k, v, allowed, scale=scale, causal=False)
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)

    def depth_weights(self, x: Tensor, earlier: Tensor) -> Tensor:
        """How much each token takes from each layer of each token: [b, heads, n, n, layers]."""
        q, k, _ = self._project(x, earlier)
        n = x.shape[1]
        past = torch.ones(n, n, dtype=torch.bool, device=x.device).tril().repeat_interleave(self.layers, -1)
        keys = k.unflatten(-1, (self.layers, self.head_dim)).flatten(2, 3)
        return masked_softmax(q @ keys.mT * self.head_dim**-0.5, past).unflatten(-1, (n, self.layers))

    def _read(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [b, h, n, d], k and v [b, h, m layers, d], layers of a token side by side, and the padding [b, m]."""
        q, k, v = self._project(x, call.inputs["earlier"])
        padding, state = call.padding, call.state
        if state is not None:
            usual = torch.ones(1, call.seen + x.shape[1], dtype=torch.bool, device=x.device)
            padding = state.append_optional("padding", padding, usual)
            k, v = state.append("keys", k), state.append("values", v)
            state.advance(x.shape[1])
        k, v = (t.unflatten(-1, (self.layers, self.head_dim)).flatten(2, 3) for t in (k, v))
        return q, k, v, padding

    def _project(self, x: Tensor, earlier: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, h, n, d]; k, v [b, h, n, layers d]: one row per token, as a state grows."""
        wanted = (*x.shape[:2], self.layers, self.dim)
        if not isinstance(earlier, Tensor) or earlier.shape != wanted or earlier.device != x.device:
            what = f"{list(earlier.shape)} on {earlier.device}" if isinstance(earlier, Tensor) else repr(earlier)[:80]
            raise ValueError(
                f"{self.card.name}: earlier is {what}; want {list(wanted)} on {x.device}: as many layers below it as "
                f"it was built for, layers={self.layers}"
            )
        deep = torch.stack([f(h) for f, h in zip(self.features, earlier.unbind(2), strict=True)], 2)
        k, v = (
            p(deep).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)
            for p in (self.k_proj, self.v_proj)
        )
        return self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v
