"""Routing attention: online k-means decides who attends to whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.deferred import Deferred, recomputing
from manyheads.functional.grouped import attend_rows, grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.spans import attend_spans
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


@register
class RoutingTransformer(Mechanism):
    """Tokens attend within clusters that a running k-means finds; some heads attend locally instead.

        q^, k^: layer norm without parameters (onto a sphere); mu_c: centroids, per head
        noncausal: cluster c holds the `window` queries of largest mu_c . q^ and the `window` keys of largest mu_c . k^;
            o_i = mean over the clusters that hold i of softmax(q^_i . k^_j / sqrt(d)) v_j
        causal: k^ = q^, and i sees the newest `window` tokens j <= i whose nearest centroid is the one nearest to it
        local heads (the first local_heads): softmax over |i - j| < local_window, of q and k that are not normed

    A token in no cluster gets zero. In training mu_c moves by 1 - decay towards the mean of the q^, k^ nearest to it.
    Losses: `commitment`, mean |q^ - mu|^2 / d over real tokens (and k^), as in lucidrains' code, which weighs it 1e-4.

    Source: arXiv:2003.05997 (algorithm 1) and its code (TensorFlow), which scores normed q and k too, and whose norm
    takes the 1 / sqrt(d) away again. lucidrains' code norms to length 1, for the routing, and scores q as it is.
    Divergence: the causal form of both takes the best `window` tokens of the whole sequence, so that later ones decide
    what earlier ones see. Here it is the nearest-centroid rule of section 4, cut to the newest tokens. Centroids start
    at random, and move when the first training pass after a backward begins, by what all passes before it gathered: a
    pass is routed by those before, also where checkpointing repeats it.
    """

    card = Card(
        name="routing-transformer",
        title="Efficient Content-Based Sparse Attention with Routing Transformers",
        reference="arXiv:2003.05997",
        family=Family.SELECTION,
        patterns={"noncausal-self", "causal-self"},
        time="n window clusters",
        state="n",
        example={"clusters": 2, "window": 4, "local_heads": 1, "local_window": 3},
        notes="The causal form routes each token by itself, unlike the published one, which looks ahead to choose.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        clusters: int = 8,
        window: int = 64,
        local_heads: int | None = None,
        local_window: int = 64,
        decay: float = 0.999,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = d = self._split_heads()
        self.local_heads = heads // 2 if local_heads is None else local_heads
        if not 0 <= self.local_heads <= heads or min(clusters, window, local_window) < 1 or not 0 <= decay <= 1:
            raise ValueError(
                f"{self.card.name}: clusters={clusters}, window={window}, local_heads={local_heads}, "
                f"local_window={local_window}, decay={decay}; want positive sizes, at most heads={heads} local heads "
                "and a decay from 0 to 1"
            )
        self.clusters, self.window, self.local_window, self.decay = clusters, window, local_window, decay
        self.scale = d**-0.5
        self.routed = heads - self.local_heads
        keyed = self.local_heads if causal else heads
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.k_proj = nn.Linear(dim, keyed * d, bias=bias) if keyed else None
        self.register_buffer("centroids", _norm(torch.randn(self.routed, clusters, d)))
        self.register_buffer("means", torch.zeros(self.routed, clusters, d))
        self.register_buffer("sizes", torch.zeros(self.routed, clusters, 1, dtype=torch.long))
        self.centroids: Tensor
        self.means: Tensor
        self.sizes: Tensor
        self.deferred = Deferred()

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        q, v, local = self._split(self.q_proj(x)), self._split(self.v_proj(x)), self.local_heads
        k = q[:, :0] if self.k_proj is None else self._split(self.k_proj(x))
        routed = _norm(q[:, local:])
        keys = routed if self.causal else _norm(k[:, local:])
        if self.training and self.deferred.due():
            # Not before: tokens are routed by centroids that no token of this pass has moved, in backward too.
            self._move()
        losses = self._learn([routed] if self.causal else [routed, keys], call.padding)
        ids = self._nearest(keys) if self.causal else None
        k, real = torch.cat([k[:, :local], keys], 1), call.padding
        if call.state is not None:
            usual = torch.ones(1, call.seen + x.shape[1], dtype=torch.bool, device=x.device)
            real = call.state.append_optional("padding", real, usual)
            k, v = call.state.append("keys", k), call.state.append("values", v)
            assert ids is not None
            ids = call.state.append("clusters", ids[..., None])[..., 0]
            call.state.advance(x.shape[1])
        if ids is not None and real is not None:
            # Padding is in a cluster of its own: not in what the state holds, as a later mask may show what is hidden.
            ids = ids.masked_fill(~real[:, None], self.clusters)
        parts = []
        if local:
            parts.append(self._local(q[:, :local], k[:, :local], v[:, :local], real, call))
        if self.routed:
            way = self._clustered if ids is None else self._causal
            parts.append(way(routed, k[:, local:], v[:, local:], real, ids, call))
        mixed = torch.cat([part for part, _ in parts], 1)
        weights = torch.cat([weight for _, weight in parts if weight is not None], 1) if call.need_weights else None
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if self.training:
            self.deferred.watch(output)
        return Result(output, weights, losses)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    # -- k-means ---------------------------------------------------------------------------------------------------

    def _learn(self, rows: list[Tensor], real: Tensor | None) -> Mapping[str, Tensor]:
        """The commitment loss of normed rows [b, h, n, d]; in training they are gathered for the centroids."""
        if not self.routed:
            return {}
        tokens = torch.cat(rows, 2)
        count = torch.ones_like(tokens[:, :1, :, 0]) if real is None else real[:, None].repeat(1, 1, len(rows))
        count = count.to(tokens.dtype)
        nearest = (tokens.detach() @ self.centroids.mT).argmax(-1)
        own = self.centroids.expand(tokens.shape[0], -1, -1, -1).gather(
            2, nearest[..., None].expand(-1, -1, -1, self.head_dim)
        )
        gap = ((tokens - own).square().mean(-1) * count).masked_fill(count == 0, 0.0)
        losses = {"commitment": gap.sum() / (count.sum().clamp(min=1) * self.routed)}
        if self.training and not recomputing():
            self._gather(tokens, F.one_hot(nearest, self.clusters).to(tokens.dtype) * count[..., None])
        return losses

    @torch.no_grad()
    def _gather(self, tokens: Tensor, member: Tensor) -> None:
        """The mean of what is nearest to each centroid, over all passes until they move."""
        new = member.sum((0, 2))[..., None].long()
        sizes = self.sizes + new
        gap = torch.einsum("bhnc,bhnd->hcd", member, tokens) - new * self.means
        self.means.add_(gap / sizes.clamp(min=1))
        self.sizes.copy_(sizes)

    @torch.no_grad()
    def _move(self) -> None:
        moved = self.centroids.lerp(self.means, 1 - self.decay)
        self.centroids.copy_(torch.where(self.sizes > 0, moved, self.centroids))
        self.means.zero_()
        self.sizes.zero_()

    def _nearest(self, rows: Tensor) -> Tensor:
        """[b, h, n]."""
        return (rows.detach() @ self.centroids.mT).argmax(-1)

    # -- the three kinds of attention ------------------------------------------------------------------------------

    def _local(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
        n, m, reach = q.shape[2], k.shape[2], self.local_window - 1
        i, j = torch.arange(m - n, m, device=q.device)[:, None], torch.arange(m, device=q.device)
        dense = call.dense if call.dense is None or call.dense.shape[1] == 1 else call.dense[:, : self.local_heads]

        def allowed(rows: slice, keys: slice) -> Tensor:
            lag = i[rows] - j[keys]
            near = ((lag.abs() <= reach) & ((lag >= 0) | (not self.causal)))[None, None]
            near = near if real is None else near & real[:, None, None, keys]
            return near if dense is None else near & dense[:, :, rows, keys]

        def span(rows: slice) -> slice:
            behind = 0 if self.causal else reach
            return slice(max(m - n + rows.start - reach, 0), min(m - n + rows.stop + behind, m))

        if call.need_weights:
            return _weighed(q * self.scale, k, v, allowed(slice(0, n), slice(0, m)))
        return attend_spans(q, k, v, span, allowed, scale=self.scale), None

    def _clustered(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, ids: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """The published choice: each cluster takes its own queries and its own keys."""
        (b, h, n, d), w = q.shape, min(self.window, q.shape[2])
        chosen_q, chosen_k = self._top(q, real, w), self._top(k, real, w)
        own = _take(q, chosen_q) * self.scale
        scores = own @ _take(k, chosen_k).mT
        allowed = None
        if real is not None:
            here = real[:, None, None].expand(-1, h, self.clusters, -1)
            allowed = here.gather(3, chosen_k)[..., None, :] & here.gather(3, chosen_q)[..., None]
        place = chosen_q[..., None] * n + chosen_k[..., None, :]
        if call.dense is not None:
            dense = call.dense if call.dense.shape[1] == 1 else call.dense[:, self.local_heads :]
            obeyed = dense.expand(-1, h, -1, -1).flatten(2).gather(2, place.flatten(2)).view_as(place)
            allowed = obeyed if allowed is None else allowed & obeyed
        weights = masked_softmax(scores, allowed)
        rows = chosen_q.flatten(2)
        times = torch.zeros_like(q[..., 0]).scatter_add_(2, rows, torch.ones_like(rows, dtype=q.dtype)).clamp(min=1)
        out = (weights @ _take(v, chosen_k)).flatten(2, 3)
        mixed = torch.zeros_like(q).scatter_add(2, rows[..., None].expand(-1, -1, -1, d), out) / times[..., None]
        if not call.need_weights:
            return mixed, None
        full = weights.new_zeros(b, h, n * n).scatter_add(2, place.flatten(2), weights.flatten(2))
        return mixed, full.view(b, h, n, n) / times[..., None]

    def _top(self, rows: Tensor, real: Tensor | None, w: int) -> Tensor:
        """The w rows nearest to each centroid, [b, h, c, w]."""
        near = self.centroids @ rows.detach().mT
        if real is not None:
            near = near.masked_fill(~real[:, None, None], -torch.inf)
        return near.topk(w, -1).indices

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, ids: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        assert ids is not None
        n, m = q.shape[2], k.shape[2]
        if n == m and call.dense is None and not call.need_weights:
            return self._in_order(q, k, v, ids), None
        member = F.one_hot(ids, self.clusters + 1)
        rank = member.cumsum(2).gather(3, ids[..., None])[..., 0]
        dense = call.dense if call.dense is None or call.dense.shape[1] == 1 else call.dense[:, self.local_heads :]
        j = torch.arange(m, device=q.device)

        def allowed(rows: slice) -> Tensor:
            own = slice(m - n + rows.start, m - n + rows.stop)
            same = (ids[..., own, None] == ids[..., None, :]) & (ids[..., own, None] < self.clusters)
            newest = rank[..., own, None] - rank[..., None, :] < self.window
            found = same & newest & (j[own, None] >= j)
            return found if dense is None else found & dense[:, :, rows]

        if call.need_weights:
            return _weighed(q * self.scale, k, v, allowed(slice(0, n)))
        return attend_rows(q, k, v, allowed, scale=self.scale, causal=True), None

    def _in_order(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        """Sorted by cluster, what a token sees are the `window` rows that end at its own: a band."""
        order = ids.sort(dim=2, stable=True).indices
        ids = ids.gather(2, order)
        place = order[..., None].expand_as(q)
        j = torch.arange(q.shape[2], device=q.device)

        def reach(rows: slice) -> slice:
            return slice(max(rows.start - self.window + 1, 0), rows.stop)

        def allowed(rows: slice, keys: slice) -> Tensor:
            lag = j[rows, None] - j[keys]
            same = (ids[..., rows, None] == ids[..., None, keys]) & (ids[..., rows, None] < self.clusters)
            return same & (lag >= 0) & (lag < self.window)

        q, k, v = (t.gather(2, place) for t in (q, k, v))
        out = attend_spans(q, k, v, reach, allowed, scale=self.scale)
        return torch.zeros_like(q).scatter(2, place, out)


def _norm(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[-1:])


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [b, h, n, d], index [b, h, c, w] -> [b, h, c, w, d]."""
    return rows.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, rows.shape[-1])).unflatten(2, index.shape[2:])


def _weighed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    weights = masked_softmax(grouped_scores(q, k), allowed)
    return grouped_mix(weights, v), weights
