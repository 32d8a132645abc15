"""Global-local and pair-wise cross attention, of dual cross-attention learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.finite import blanked
from manyheads.functional.multihead import Heads, key_mask
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

REFERENCE = "arXiv:2205.02151"
TITLE = "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification"


@register
class GlobalLocal(Mechanism):
    """Only the class token and the part of an image that it looked at most ask again, over the whole image.

        y_i = W_o softmax(q_i K^T / sqrt(d)) V  for i = 0 and the max(1, int(ratio (n - 1))) others of largest rollout_i
        y_i = 0                                 for all others, which the residual outside leaves as they were

    rollout: [b, n], what `attention_rollout` makes of the layers before. Token 0 is the class token. Padded tokens are
    not counted in n. ratio is 0.1 for fine-grained categories in the paper, 0.3 for re-identification.

    Source: Zhu et al., Dual Cross-Attention Learning, arXiv:2205.02151, equation 3, of which no official code was
    found. It does not say whether the class token asks and what becomes of tokens that do not; both are answered as
    third parties do.
    """

    card = Card(
        name="global-local",
        title=TITLE,
        reference=REFERENCE,
        family=Family.CROSS,
        patterns={"noncausal-self"},
        time="ratio n^2",
        state="",
        decodes=False,
        example={"ratio": 0.3},
        takes={"rollout": "[b, n] floats, how much token 0 has looked at each token"},
        notes="token 0 is the class token; one such layer stands beside the usual ones",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, ratio: float = 0.1, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if not 0 < ratio <= 1:
            raise ValueError(f"global-local: ratio={ratio}; want more than 0 and at most 1")
        self.ratio, self.attention = ratio, Heads(dim, heads, bias)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"rollout": (torch.arange(n) * 2.3).sin()[None] + 1}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        chosen, asks = self._choose(x, call.inputs["rollout"], call.padding)
        heads, rows = self.attention, chosen[..., None].expand(-1, -1, x.shape[2])
        allowed = key_mask(call.padding)
        if call.dense is not None:
            each = chosen[:, None, :, None].expand(-1, call.dense.shape[1], -1, x.shape[1])
            allowed = call.dense.gather(2, each)
        q, (k, v) = heads.split(heads.q_proj(x.gather(1, rows))), heads.read(x)
        mixed, weights = attend_weighted(q, k, v, allowed, scale=heads.scale, need_weights=call.need_weights)
        found = heads.join(mixed)
        found = found.masked_fill(~asks[..., None], 0.0)
        output = torch.zeros_like(x, dtype=found.dtype).scatter(1, rows.expand_as(found), found)
        if weights is not None:
            b, h, k_rows, n = weights.shape
            weights = weights.masked_fill(~asks[:, None, :, None], 0.0)
            into = chosen[:, None, :, None].expand(b, h, k_rows, n)
            weights = weights.new_zeros(b, h, n, n).scatter(2, into, weights)
        return Result(output, weights)

    def _choose(self, x: Tensor, rollout: Any, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which tokens ask, [b, most], token 0 first, and how far each row is to be read, [b, most]."""
        n, fits = x.shape[1], isinstance(rollout, Tensor) and rollout.is_floating_point() and rollout.device == x.device
        if not fits or rollout.shape != x.shape[:2]:
            given = list(rollout.shape) if isinstance(rollout, Tensor) else type(rollout).__name__
            raise ValueError(f"global-local: rollout is {given}; want floats {list(x.shape[:2])} on {x.device}")
        shown = torch.ones_like(rollout, dtype=torch.bool) if real is None else real
        others = shown.sum(1) - shown[:, 0].long() if real is not None else shown.sum(1) - 1
        wanted = (others * self.ratio).long().clamp(min=1).minimum(others)
        score = rollout.detach().masked_fill(~shown, -torch.inf)
        most = min(max(int((n - 1) * self.ratio), 1), n - 1)
        best = score[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :most] + 1
        asks = torch.arange(most, device=x.device) < wanted[:, None]
        return torch.cat([torch.zeros_like(best[:, :1]) if most else best.new_zeros(len(x), 1), best], 1), torch.cat(
            [shown[:, :1], asks], 1
        )


@register
class PairWise(Mechanism):
    """An image attends to itself and, as to a distractor, to another: one softmax over the keys of both.

        y = W_o softmax(Q_1 [K_1 ; K_2]^T / sqrt(d)) [V_1 ; V_2],  all of the same weights

    For training alone: without a context it is plain self-attention with these weights, which is what the paper tests
    with. The mask is of what is called last, the other image where there is one; own: [b, n], which tokens of x are
    real beside it. `paired` draws partners within a batch. Weights [b, heads, n, m] are those on the other image.

    Source: Zhu et al., Dual Cross-Attention Learning, arXiv:2205.02151, equation 4; no official code was found.
    """

    card = Card(
        name="pair-wise",
        title=TITLE,
        reference=REFERENCE,
        family=Family.CROSS,
        patterns={"noncausal-cross", "noncausal-self"},
        time="n (n + m)",
        state="",
        decodes=False,
        takes={"own": "optional [b, n] booleans, which tokens of x are real, beside a context"},
        notes="a context is a distractor, in training; leave it out to test",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, bias: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.attention = Heads(dim, heads, bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        heads, own = self.attention, call.inputs.get("own")
        if own is not None and (context is None or getattr(own, "dtype", None) != torch.bool):
            raise ValueError("pair-wise: own says in booleans what of x is real beside a context; else use the mask")
        if own is not None and own.shape != x.shape[:2]:
            raise ValueError(f"pair-wise: own is {list(own.shape)}; want {list(x.shape[:2])}")
        if context is None:
            allowed = call.dense if call.padding is None else key_mask(call.padding)
            return Result(*heads(x, *heads.read(x), allowed, call.need_weights))
        n, m = x.shape[1], context.shape[1]
        both = torch.cat([x if own is None else blanked(x, ~own), context], 1)
        mixed, weights = heads(x, *heads.read(both), self._allowed(x, own, m, call), call.need_weights)
        return Result(mixed, None if weights is None else weights[..., n:])

    def _allowed(self, x: Tensor, own: Tensor | None, m: int, call: Call) -> Tensor | None:
        if own is None and call.padding is None and call.dense is None:
            return None
        first = torch.ones_like(x[..., 0], dtype=torch.bool) if own is None else own
        other = call.dense
        if other is None:
            other = key_mask(x.new_ones(len(x), m, dtype=torch.bool) if call.padding is None else call.padding)
        assert other is not None
        mine = first[:, None, None].expand(-1, other.shape[1], other.shape[2], -1)
        return torch.cat([mine, other], -1)


def attention_rollout(weights: Sequence[Tensor]) -> Tensor:
    """How much token 0 has looked at each token through layers with residuals: row 0 of the product, last layer first,
    of (mean over heads of the weights + I) / 2. weights: [b, heads, n, n] of each layer, first layer first -> [b, n].
    """
    if not weights:
        raise ValueError("attention_rollout: no weights; want those of one layer at least, [b, heads, n, n]")
    row = torch.zeros_like(weights[-1][:, 0, 0])
    row[:, 0] = 1
    for layer in reversed(weights):
        row = (row + (row[:, None] @ layer.mean(1))[:, 0]) / 2
    return row


def paired(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Another row for each row of a batch, [batch], each once: a random order, read in a ring."""
    if batch < 2:
        raise ValueError(f"paired: a batch of {batch}; want two rows at least, for each to have another")
    ring = torch.randperm(batch, generator=generator)
    partner = torch.empty_like(ring)
    partner[ring] = ring.roll(1)
    return partner
