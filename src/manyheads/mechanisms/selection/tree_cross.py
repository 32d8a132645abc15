"""Tree cross attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_masked, masked_softmax
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register


class _Level(NamedTuple):
    """Nodes at one height: keys and values [b, h, c, d], and how many real tokens are below each [b, c]."""

    keys: Tensor
    values: Tensor
    size: Tensor


class _Found(NamedTuple):
    """What queries meet: scores [b, h, n, s] and values [b, h, n, s, d] of the nodes, which of them are kept [b, n, s],
    their heights and numbers; the log-probability of each way down [b, n], and the entropy of the choices."""

    scores: Tensor
    values: Tensor
    kept: Tensor
    nodes: list[tuple[int, Tensor]]
    chance: Tensor
    entropy: Tensor


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

    Source: arXiv:2309.17388 and its released code, where p also learns by REINFORCE, and by a second output that
    attends to all leaves: `tree_objective` below. Without it p learns through the projections it shares. The code takes
    the entropy of each head's softmax and not of p, detaches children unless bptt is set, and fills the tree up with
    masked copies of tokens.
    Matrix: a summary's weight is shared evenly by the tokens below it; no exact matrix exists.
    """

    card = Card(
        name="tree-cross",
        title="Tree Cross Attention",
        reference="arXiv:2309.17388",
        family=Family.SELECTION,
        patterns={"noncausal-cross", "causal-cross"},
        time="m + n log m",
        state="1",
        notes="The tree is built once per context; which branch is taken has a gradient in tree_objective only.",
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
        found = self._search(self._split(self.q_proj(x)), levels)
        output, weights = self._mix(found)
        if call.need_weights:
            weights = self._spread(weights, found.nodes, context, call.padding)
        return Result(output, weights if call.need_weights else None, {"entropy": found.entropy})

    def _mix(self, found: _Found) -> tuple[Tensor, Tensor]:
        weights = masked_softmax(found.scores, found.kept[:, None])
        return self._join((weights[..., None, :] @ found.values).squeeze(-2)), weights

    def _join(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

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

    def _search(self, q: Tensor, levels: list[_Level]) -> _Found:
        """q [b, h, n, d]."""
        b, _, n, d = q.shape
        q, chance = q * d**-0.5, q.new_zeros(b, n)
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
                chance = chance + (policy.gather(2, chosen)[..., 0] + 1e-9).log()
                parent = children.gather(2, chosen)
                real = real & torch.ones_like(real).scatter(2, chosen, False)
            scores.append(score)
            values.append(found)
            kept.append(real)
            nodes.append((height, children))
        entropy = torch.stack(entropies).mean() if entropies else q.sum() * 0
        return _Found(torch.cat(scores, -1), torch.cat(values, -2), torch.cat(kept, -1), nodes, chance, entropy)

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


def tree_objective(
    module: TreeCross,
    x: Tensor,
    context: Tensor,
    error: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
    leaves: float = 1.0,
    bonus: float = 0.01,
) -> Tensor:
    """The paper's training objective, for a module that ends in `error`: its output [b, n, e] -> what each query got
    wrong, [b, n], by which the way that was drawn is also judged (REINFORCE). mask: key padding [b, m].

        mean of error(tree) + leaves error(all leaves) + error(tree) log p(way),  less bonus times the entropy

    where the last error is a constant. The weights are those of the released code.
    """
    pattern = module._check_inputs(x, context)
    if mask is not None:
        module._want_mask(mask, [tuple(context.shape[:2])])
    levels, q = module._levels(context, Call(pattern, mask)), module._split(module.q_proj(x))
    found, bottom = module._search(q, levels), levels[0]
    real = (bottom.size > 0)[:, None, None]
    whole = attend_masked(q, bottom.keys, bottom.values, real, scale=module.head_dim**-0.5)
    wrong = error(module._mix(found)[0])
    judged = wrong + leaves * error(module._join(whole)) + wrong.detach() * found.chance
    return judged.mean() - bonus * found.entropy
