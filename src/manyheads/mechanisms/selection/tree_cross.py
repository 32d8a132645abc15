"""Tree cross attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _Level(NamedTuple):
    """Nodes at one height: keys and values [b, h, c, d], and how many real tokens are below each [b, c]."""

    keys: Tensor
    values: Tensor
    size: Tensor


class _Aggregator(nn.Module):
    """Children [.., c, e] -> their parent [.., e]: a transformer layer among them, and the mean over the real ones."""

    def __init__(self, dim: int, heads: int, ff_dim: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv_proj, self.o_proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.up_proj, self.down_proj = nn.Linear(dim, ff_dim), nn.Linear(ff_dim, dim)

    def forward(self, children: Tensor, real: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for t in self.qkv_proj(self.attention_norm(children)).chunk(3, -1)
        )
        weights = masked_softmax(q * q.shape[-1] ** -0.5 @ k.mT, real[..., None, None, :])
        rows = children + self.o_proj((weights @ v).transpose(-2, -3).flatten(-2))
        rows = rows + self.down_proj(F.gelu(self.up_proj(self.ff_norm(rows))))
        total = rows.masked_fill(~real[..., None], 0.0).sum(-2)
        return total / real.sum(-1, keepdim=True).clamp(min=1)


@register
class TreeCross(Mechanism):
    """A query goes down a tree over the context and attends to the O(log m) nodes that it leaves beside its path.

        node = mean over its children of a transformer layer among them;  leaves: the context tokens, in their order
        from the root on: p = mean over heads of softmax(q . k_c / sqrt(d)) over the children c; go to the largest p (in
        training: drawn from p), keep the others;  of the last node keep all leaves
        softmax over all nodes kept of q . k / sqrt(d), times v, with the same projections

    branch: children per node. Order matters: the paper sorts tokens (for images and functions, as in a k-d tree).
    Losses: `entropy`, mean of -sum p log p over queries and levels; the paper adds a bonus for it to the task's loss.

    Source: arXiv:2309.17388 and its released code, where p also learns by REINFORCE, with the task's result as reward,
    and by a second output that attends to all leaves: both are the training loop's, and p learns here through the
    projections it shares. There the tree is filled up with masked copies of tokens.
    Weights: a summary's weight is shared evenly by the tokens below it; no exact matrix exists.
    """

    card = Card(
        name="tree-cross",
        title="Tree Cross Attention",
        reference="arXiv:2309.17388",
        family=Family.SELECTION,
        patterns={"noncausal-cross", "causal-cross"},
        time="m + n log m",
        state="1",
        notes="The tree is built once per context; which branch is taken has no gradient of its own.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        branch: int = 2,
        ff_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if branch < 2 or (ff_dim is not None and ff_dim < 1):
            raise ValueError(f"{self.card.name}: branch={branch}, ff_dim={ff_dim}; want branch >= 2 and ff_dim >= 1")
        self.branch = branch
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.aggregator = _Aggregator(dim, heads, 2 * dim if ff_dim is None else ff_dim, bias)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"{self.card.name}: a dense mask was given, but the tree is built once for all queries; give key "
                "padding [batch, m] as the mask"
            )
        levels = self._levels(context, call)
        if call.state is not None:
            call.state.advance(x.shape[1])
        q = self._split(self.q_proj(x)) * self.head_dim**-0.5
        scores, values, kept, nodes, entropy = self._search(q, levels)
        weights = masked_softmax(scores, kept[:, None])
        mixed = (weights[..., None, :] @ values).squeeze(-2)
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return Result(
            output, self._spread(weights, nodes, context, call.padding) if call.need_weights else None, entropy
        )

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    # -- the tree --------------------------------------------------------------------------------------------------

    def _levels(self, context: Tensor, call: Call) -> list[_Level]:
        """From the leaves to the children of the root, each filled up to a multiple of `branch`."""
        held = {} if call.state is None else call.state.context
        if held:
            count = len(held) // len(_Level._fields)
            return [_Level(*(held[f"{name}_{i}"] for name in _Level._fields)) for i in range(count)]
        nodes, size = context, torch.ones_like(context[..., 0], dtype=torch.long)
        if call.padding is not None:
            # Real tokens to the front: padding must not move the branches.
            order = (~call.padding).int().sort(dim=1, stable=True).indices
            nodes = nodes.masked_fill(~call.padding[..., None], 0.0)
            nodes = nodes.gather(1, order[..., None].expand_as(nodes))
            size = call.padding.long().gather(1, order)
        levels: list[_Level] = []
        while True:
            more = -nodes.shape[1] % self.branch
            nodes, size = F.pad(nodes, (0, 0, 0, more)), F.pad(size, (0, more))
            levels.append(_Level(self._split(self.k_proj(nodes)), self._split(self.v_proj(nodes)), size))
            if nodes.shape[1] <= self.branch:
                break
            real = (size > 0).unflatten(1, (-1, self.branch))
            nodes = self.aggregator(nodes.unflatten(1, (-1, self.branch)), real)
            size = size.unflatten(1, (-1, self.branch)).sum(-1)
        if call.state is not None:
            for i, level in enumerate(levels):
                held.update({f"{name}_{i}": tensor for name, tensor in level._asdict().items()})
        return levels

    # -- the way down ----------------------------------------------------------------------------------------------

    def _search(
        self, q: Tensor, levels: list[_Level]
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, Tensor]], dict[str, Tensor]]:
        """q [b, h, n, d] -> scores [b, h, n, s] and values [b, h, n, s, d] of the nodes met, which of them are kept
        [b, n, s], their heights and numbers, and the entropy of the choices."""
        b, _, n, d = q.shape
        parent = torch.zeros(b, n, 1, dtype=torch.long, device=q.device)
        scores, values, kept, nodes, entropies = [], [], [], [], []
        for height, level in reversed(list(enumerate(levels))):
            children = parent * self.branch + torch.arange(self.branch, device=q.device)
            index = children.flatten(1)[:, None, :, None].expand(-1, self.heads, -1, d)
            keys, found = (t.gather(2, index).unflatten(2, (n, -1)) for t in (level.keys, level.values))
            real = (level.size > 0).gather(1, children.flatten(1)).view_as(children)
            score = (keys @ q[..., None]).squeeze(-1)
            if height:
                policy = masked_softmax(score, real[:, None]).mean(1)
                entropies.append(-(policy * (policy + 1e-9).log()).sum(-1))
                chosen = self._choose(policy.detach())
                parent = children.gather(2, chosen)
                real = real & torch.ones_like(real).scatter(2, chosen, False)
            scores.append(score)
            values.append(found)
            kept.append(real)
            nodes.append((height, children))
        entropy = torch.stack(entropies).mean() if entropies else q.sum() * 0
        return torch.cat(scores, -1), torch.cat(values, -2), torch.cat(kept, -1), nodes, {"entropy": entropy}

    def _choose(self, policy: Tensor) -> Tensor:
        if not self.training:
            return policy.argmax(-1, keepdim=True)
        # Below a node of nothing there is nothing to draw: its first child, which is there in any case.
        first = F.one_hot(torch.zeros_like(policy[..., 0], dtype=torch.long), policy.shape[-1])
        safe = torch.where(policy.sum(-1, keepdim=True) > 0, policy, first.to(policy.dtype))
        return torch.multinomial(safe.flatten(0, 1), 1).view(*policy.shape[:2], 1)

    def _spread(
        self, weights: Tensor, nodes: list[tuple[int, Tensor]], context: Tensor, padding: Tensor | None
    ) -> Tensor:
        """[b, h, n, m]."""
        m = context.shape[1]
        real = torch.ones_like(context[..., 0], dtype=torch.bool) if padding is None else padding
        slot = real.cumsum(1) - 1
        full = weights.new_zeros(*weights.shape[:3], m)
        for (height, children), part in zip(nodes, weights.split(self.branch, -1), strict=True):
            own = slot // self.branch**height
            below = (children[..., None] == own[:, None, None]) & real[:, None, None]
            share = below / below.sum(-1, keepdim=True).clamp(min=1)
            full = full + torch.einsum("bhnc,bncm->bhnm", part, share.to(part.dtype))
        return full
