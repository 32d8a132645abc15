"""Core context aware attention: far tokens in groups, near tokens one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.linear import needs_matrix
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention
from manyheads.state import State

FAR = 1 << 40  # the group of a core that is not there: behind every query


class Layout(NamedTuple):
    """Tokens in the order of their place among the real ones. slots [b, n]: where each token of the pass lies, `size`
    for padding. base [b]: place of slot 0, the first of a group. held, filled [b]: slots before and after the pass."""

    slots: Tensor
    base: Tensor
    held: Tensor
    filled: Tensor
    size: int


class Cores(NamedTuple):
    """keys, values [b, h, c, d] of groups [b, c] (FAR: no such core in this row)."""

    keys: Tensor
    values: Tensor
    groups: Tensor


@register
class CoreContextAware(SoftmaxAttention):
    """Every group of tokens is pooled into a core by what its last token looks at; queries see the cores of what is far
    and the tokens of what is near, in one softmax.

        core_G = sum over j in G of softmax_j(q_last(G) . k_j / sqrt(d)) [k_j, v_j];  near(i): from the start of the
        group of place i - window + 1 up to i;  cores of the groups before it

    so that every token counts once. The paper pools inputs and then projects them: the same per head, as the projection
    is linear. A token's place is counted over real tokens. State: near tokens, and a core per group.
    Weights over tokens: those of near tokens, and of cores times their pooling.
    rotary: q and k are turned before anything is pooled, so that a core is a mean of turned keys and needs no place of
    its own, and its tokens weigh what the last one's attention gives them; a hosted layer with group=1, or a window
    over all, is itself again. Heads that share keys pool them apart, and are repeated.
    Source: Chen et al., Core Context Aware Transformers, arXiv:2412.12465; there is no released code. Pooling by each
    head's own query is our reading, and so is turning before pooling: what we could read of the paper gives no place
    to a core.
    """

    card = Card(
        name="cca",
        title="Core Context Aware Transformers for Long Context Language Modeling",
        reference="arXiv:2412.12465",
        family=Family.TOKENS,
        patterns={"causal-self"},
        time="n^2 / group + n window",
        state="n / group + window",
        example={"group": 3, "window": 4},
        notes="Far tokens are seen in groups. With a state, neither dense masks nor weights reach back to earlier "
        "passes.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        group: int = 16,
        window: int = 1024,
        kv_heads: int | None = None,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if group < 1 or window < 1:
            raise ValueError(f"cca: group={group}, window={window}; want at least one token in each")
        self.group, self.window = group, window

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        self._check(call)
        positions = call.query_positions(x)
        q, k, v = self.project(x, x)
        q, k = self.position(q, k, positions, positions)
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        layout, (old_k, old_v) = self._layout(x, k, call)
        q = _place(q, layout, torch.zeros_like(old_k))
        k, v = _place(k, layout, old_k), _place(v, layout, old_v)
        fresh, pooling = self._pool(q, k, v, layout)
        cores = self._remembered(fresh, call.state)
        # Slots that every row filled in earlier passes ask nothing any more.
        new = int(layout.held.min()) if old_k.shape[2] else 0
        mixed, weights = self._seen_by(q[:, :, new:], k, v, cores, pooling if call.need_weights else None, layout)
        if call.state is not None:
            self._keep(k, v, fresh, layout, call.state)
            call.state.advance(x.shape[1])
        mixed = _taken(mixed, layout.slots - new)
        if weights is not None:
            weights = _taken(_taken(weights, layout.slots).mT, layout.slots).mT
        return Result(self.o_proj(mixed.transpose(1, 2).flatten(-2)), weights)

    def _check(self, call: Call) -> None:
        needs_matrix(self.card.name, seen=call.seen, dense=call.dense, need_weights=call.need_weights)
        if call.dense is not None:
            raise ValueError(
                "cca: a dense mask was given, but far tokens are seen through cores only; give key padding [batch, n] "
                "as the mask"
            )

    def _near(self, place: Tensor) -> Tensor:
        """The first place that a query at `place` sees as a token: the start of a group."""
        return (place - self.window + 1).clamp(min=0) // self.group * self.group

    def _layout(self, x: Tensor, like: Tensor, call: Call) -> tuple[Layout, tuple[Tensor, Tensor]]:
        """Where the tokens go, and the keys and values that the state holds for the first slots."""
        b, n, _ = x.shape
        held = {} if call.state is None else call.state.fixed
        if "base" in held:
            base, count, tail = held["base"], held["count"], (held["keys"], held["values"])
        else:
            base = count = torch.zeros(b, dtype=torch.long, device=x.device)
            tail = (like[:, :, :0], like[:, :, :0])
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if call.padding is None else call.padding
        size = n + (int(count.max()) if tail[0].shape[2] else 0)
        size += -size % self.group
        slots = torch.where(real, count[:, None] + real.cumsum(1) - 1, size)
        return Layout(slots, base, count, count + real.sum(1), size), tail

    def _pool(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Cores, Tensor]:
        """A core per group of slots, FAR unless this pass has its last token, and the pooling weights [b, h, c, g]."""
        q, k, v = (t.unflatten(2, (-1, self.group)) for t in (q, k, v))
        pooling = masked_softmax(q[:, :, :, -1:] * self.scale @ k.mT, None)
        keys, values = ((pooling @ t)[:, :, :, 0] for t in (k, v))
        index = torch.arange(keys.shape[2], device=q.device)[None]
        last = index * self.group + self.group - 1
        now = (last >= layout.held[:, None]) & (last < layout.filled[:, None])
        groups = torch.where(now, layout.base[:, None] // self.group + index, FAR)
        return Cores(keys, values, groups), pooling[:, :, :, 0]

    def _remembered(self, fresh: Cores, state: State | None) -> Cores:
        """Cores of this pass behind those of the passes before."""
        if state is None or "core_groups" not in state.grown:
            return fresh
        held = (state.grown[name].view() for name in ("core_keys", "core_values", "core_groups"))
        return Cores(*(torch.cat((a, b), 1 if b.ndim == 2 else 2) for a, b in zip(held, fresh, strict=True)))

    def _seen_by(
        self, q: Tensor, k: Tensor, v: Tensor, cores: Cores, pooling: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """q [b, h, n, d] by the last n slots, k and v [b, h, size, d] by all -> what each of those n reads, and its
        weights over slots."""
        new = layout.size - q.shape[2]
        slot = torch.arange(layout.size, device=q.device)
        outs, rows = [], []
        step, earlier = max(self.group, self.window), cores.keys.shape[2] - layout.size // self.group
        for start in range(new, layout.size, step):
            stop = min(start + step, layout.size)
            first = max(start - self.window + 1, 0) // self.group * self.group
            near = self._near(layout.base[:, None] + slot[start:stop])
            reach = earlier + max(stop - self.window, 0) // self.group  # later cores are near the whole slice
            far = cores.groups[:, None, :reach] < near[..., None] // self.group
            seen = slot[first:stop] >= (near - layout.base[:, None])[..., None]
            seen = seen & (slot[first:stop] <= slot[start:stop, None])
            seen = seen & (slot[start:stop] < layout.filled[:, None])[..., None]
            keys = torch.cat((cores.keys[:, :, :reach], k[:, :, first:stop]), 2)
            scores = q[:, :, start - new : stop - new] * self.scale @ keys.mT
            weights = masked_softmax(scores, torch.cat((far, seen), 2)[:, None])
            outs.append(weights @ torch.cat((cores.values[:, :, :reach], v[:, :, first:stop]), 2))
            if pooling is not None:
                of_cores, of_tokens = weights.split((reach, stop - first), -1)
                spread = (of_cores[..., None] * pooling[:, :, None, :reach]).flatten(-2)
                spread = F.pad(spread, (0, layout.size - spread.shape[-1]))
                rows.append(spread + F.pad(of_tokens, (first, layout.size - stop)))
        return torch.cat(outs, 2), torch.cat(rows, 2) if rows else None

    def _keep(self, k: Tensor, v: Tensor, fresh: Cores, layout: Layout, state: State) -> None:
        some = (fresh.groups < FAR).any(0).nonzero()[:, 0]
        if len(some):
            state.append("core_keys", fresh.keys[:, :, some])
            state.append("core_values", fresh.values[:, :, some])
            state.append("core_groups", fresh.groups[:, some])
        base = self._near(layout.base + layout.filled)
        gone = base - layout.base
        # What the next query can see at most: its group may start group - 1 places before its window.
        wanted = gone[:, None] + torch.arange(self.window + self.group - 2, device=k.device)
        slots = torch.where(wanted < layout.filled[:, None], wanted, layout.size)
        state.fixed.update(base=base, count=layout.filled - gone, keys=_taken(k, slots), values=_taken(v, slots))


def _place(new: Tensor, layout: Layout, held: Tensor) -> Tensor:
    """new [b, h, n, d] into its slots behind those held, zero where nothing is: [b, h, size, d]."""
    room = F.pad(held, (0, 0, 0, layout.size + 1 - held.shape[2]))
    index = layout.slots[:, None, :, None].expand_as(new)
    return room.scatter(2, index, new)[:, :, : layout.size]


def _taken(rows: Tensor, slots: Tensor) -> Tensor:
    """rows [b, h, size, d] at slots [b, n]; zero at the slot behind the last."""
    return F.pad(rows, (0, 0, 0, 1)).gather(2, slots[:, None, :, None].expand(-1, *rows.shape[1:2], -1, rows.shape[3]))
