"""Luong's global and local attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.additive import additive_scores
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

SCORES = ("dot", "general", "concat")
REACHES = ("global", "local-m", "local-p")


@register
class Luong(Mechanism):
    """A decoder's state x_t weighs the states s_j of an encoder, all of them or a window, and is mixed with the result.

        score: dot x_t . s_j,  general x_t . W_a s_j,  concat v_a . tanh(W_q x_t + W_s s_j);  no 1 / sqrt(d)
        reach: global; local-m: p_t = t;  local-p: p_t = S sigmoid(v_p . tanh(W_p x_t)); S real tokens
        a_tj = softmax over j of the score, locally over |j - floor(p_t)| <= window, and for local-p then times
        exp(-2 (j - p_t)^2 / window^2), not renormalised;   output = tanh(W_c [sum_j a_tj s_j; x_t])

    heads cut x, s and the context into slices with scores and windows of their own; heads=1 is the paper's. Local
    reaches gather 2 window + 1 tokens per query, where that is less than the context. t is the query's position, at
    most S - 1; tokens count from 0.
    Source: Luong et al., arXiv:1508.04025, and its code (nmt.matlab), whose srcLens - 1 is this S: it counts an
    end-of-sentence that nobody attends to. Input feeding belongs to the decoder. Its code reads the source backwards.
    Concat: the code has no W_s (the identity); OpenNMT-py's has a bias in W_q, one in W_c, and no tanh behind W_c. The
    paper's fourth score, location (softmax(W_a x_t), a row of W_a per place), sees no s_j and holds for one greatest
    length: it is left out.
    Weights: with heads=1, q_proj[0] is the code's W_a transposed, and for concat k_proj[0] the identity.
    """

    card = Card(
        name="luong",
        title="Effective Approaches to Attention-based Neural Machine Translation",
        reference="arXiv:1508.04025",
        family=Family.PROJECTION,
        patterns={"noncausal-cross", "causal-cross"},
        time="n^2",
        state="1",
        example={"score": "general", "reach": "local-p", "window": 2},
        notes="The state keeps the count of tokens, and keys for the concat score: the rest is read from the "
        "context. With one head training takes 1.1 times as long as pytorch-nlp's: PyTorch's kernel computes "
        "the scores again and holds no matrix.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        score: str = "general",
        reach: str = "global",
        window: int = 10,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        d = self._split_heads()
        if score not in SCORES or reach not in REACHES:
            raise ValueError(
                f"luong: score={score!r}, reach={reach!r}; want one of {list(SCORES)} and one of {list(REACHES)}"
            )
        if window < 1:
            raise ValueError(f"luong: window={window} must be positive")
        self.kind, self.reach, self.window = score, reach, window
        self.q_proj = nn.Parameter(d**-0.5 * torch.randn(heads, d, d)) if score != "dot" else None
        self.k_proj = nn.Parameter(d**-0.5 * torch.randn(heads, d, d)) if score == "concat" else None
        self.score_vector = nn.Parameter(d**-0.5 * torch.randn(heads, d)) if score == "concat" else None
        self.place_proj = nn.Linear(dim, dim, bias=False) if reach == "local-p" else None
        self.place_vector = nn.Parameter(d**-0.5 * torch.randn(heads, d)) if reach == "local-p" else None
        self.o_proj = nn.Linear(2 * dim, dim, bias=False)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        positions = call.query_positions(x)
        if call.state is not None:
            call.state.advance(x.shape[1])
        values = self._split(context)
        q, k = self._split(x), self._keys(values, call)
        if self.q_proj is not None:
            q = q @ self.q_proj
        if self.reach == "global":
            found = self._global(q, k, values, call)
        else:
            found = self._local(x, q, k, values, positions, call)
        output = self.o_proj(torch.cat([found[0].transpose(1, 2).flatten(-2), x], -1)).tanh()
        return Result(output, found[1])

    def _keys(self, values: Tensor, call: Call) -> Tensor:
        """What queries are compared with: the context itself, but for the concat score, whose keys the state holds."""
        if self.k_proj is None or call.state is None:
            return values if self.k_proj is None else values @ self.k_proj
        held = call.state.context
        if "keys" not in held:
            held["keys"] = values @ self.k_proj
        if held["keys"].shape[2] != values.shape[2]:
            raise ValueError(
                f"luong: the state was made for a context of {held['keys'].shape[2]} tokens, this one has "
                f"{values.shape[2]}; start a new state for a new context"
            )
        return held["keys"]

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Of all pairs: q [b, h, n, d], k [b, h, m, d] -> [b, h, n, m]."""
        return q @ k.mT if self.score_vector is None else additive_scores(q, k, self.score_vector)

    def _own_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Of each query with keys of its own: q [b, h, n, d], k [b, h, n, keys, d] -> [b, h, n, keys]."""
        q = q[:, :, :, None]
        if self.score_vector is not None:
            return ((q + k).tanh() @ self.score_vector[:, None, :, None]).squeeze(-1)
        return (q * k).sum(-1)

    def _global(self, q: Tensor, k: Tensor, values: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        allowed = call.dense if call.padding is None else call.padding[:, None, None]
        if self.score_vector is None:
            return attend_weighted(q, k, values, allowed, scale=1.0, need_weights=call.need_weights)
        weights = masked_softmax(self._scores(q, k), allowed)
        return weights @ values, weights if call.need_weights else None

    def _local(
        self, x: Tensor, q: Tensor, k: Tensor, values: Tensor, positions: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        (b, h, m, _), n = values.shape, x.shape[1]
        real = torch.ones(1, m, dtype=torch.bool, device=x.device) if call.padding is None else call.padding
        last = real.sum(1)[:, None, None] - 1
        place = self._place(x, positions, last)
        if 2 * self.window + 1 >= m:
            return self._masked(q, k, values, real, last, place, call)
        # Real tokens first, in order: a window counts those only.
        order = torch.argsort((~real).byte(), dim=1, stable=True)
        offsets = torch.arange(-self.window, self.window + 1, device=x.device)
        near = self._centre(place, last).long()[..., None] + offsets
        inside = ((near >= 0) & (near <= last[..., None])).expand(b, h, n, -1)
        near = near.clamp(0, m - 1)
        index = order.expand(b, -1)[:, None, None].expand(-1, h, n, -1).gather(-1, near.expand(b, h, n, -1))
        if call.dense is not None:
            inside = inside & call.dense.expand(b, h, n, m).gather(-1, index)
        rows = torch.arange(b, device=x.device)[:, None, None, None]
        heads = torch.arange(h, device=x.device)[:, None, None]
        weights = self._faded(masked_softmax(self._own_scores(q, k[rows, heads, index]), inside), near, place)
        mixed = (weights[..., None, :] @ values[rows, heads, index]).squeeze(-2)
        if not call.need_weights:
            return mixed, None
        # Places outside of the context are clamped onto its ends with weight zero: they add nothing.
        return mixed, weights.new_zeros(b, h, n, m).scatter_add(-1, index, weights)

    def _masked(
        self, q: Tensor, k: Tensor, values: Tensor, real: Tensor, last: Tensor, place: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """The same for a window as wide as the context, by the matrix of all pairs."""
        at = real.cumsum(1)[:, None, None] - 1
        inside = real[:, None, None] & ((at - self._centre(place, last)[..., None]).abs() <= self.window)
        if call.dense is not None:
            inside = inside & call.dense
        weights = self._faded(masked_softmax(self._scores(q, k), inside), at, place)
        return weights @ values, weights if call.need_weights else None

    def _faded(self, weights: Tensor, at: Tensor, place: Tensor) -> Tensor:
        """weights [b, h, n, keys] of tokens at the places `at`: for local-p times the Gaussian about p_t."""
        if self.reach != "local-p":
            return weights
        return weights * (-2 * (at - place[..., None]).square() / self.window**2).exp().to(weights.dtype)

    def _place(self, x: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """p_t, [b or 1, h or 1, n], at least float32: bfloat16 cannot count to a thousand."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.place_proj is None or self.place_vector is None:
            return torch.minimum(positions[:, None], last).to(wide)
        hidden = self._split(self.place_proj(x).tanh())
        return (hidden.to(wide) @ self.place_vector[..., None].to(wide)).squeeze(-1).sigmoid() * (last + 1)

    def _centre(self, place: Tensor, last: Tensor) -> Tensor:
        """The token that a window is laid about; a sigmoid rounded up to 1 would be one past the end."""
        return torch.minimum(place.detach().floor(), last.to(place.dtype))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
