"""What mechanisms with an `attend` of their own share with the shell: joining the state, and weighing values.

b batch, h query heads, g key/value heads, n queries, m keys, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.functional.grouped import attend_grouped, attend_rows, grouped_mix, grouped_scores, masked_softmax
from manyheads.functional.where import Where
from manyheads.mechanism import Call


def joined(call: Call, x: Tensor, causal: bool, **rows: Tensor) -> tuple[Where, tuple[Tensor, ...]]:
    """Rows [b, heads, n, features] of this pass behind those that the state holds under the same names, and which
    queries meet which keys. Self attention; the state counts on, and forgets nothing."""
    seen, n, state = call.seen, x.shape[1], call.state
    j = torch.arange(seen + n, device=x.device)
    own = call.query_positions(x)
    if state is None:
        where = Where(j, j, own, own, call.padding, call.dense, causal, call.positions is None)
        return where, tuple(rows.values())
    padding = state.append_optional("padding", call.padding, torch.ones_like(j, dtype=torch.bool)[None])
    positions = state.append_optional("positions", call.positions, j[None])
    held = tuple(state.append(name, value) for name, value in rows.items())
    state.advance(n)
    key_positions = j[None] if positions is None else positions
    return Where(j[seen:], j, own, key_positions, padding, call.dense, causal, positions is None), held


def attend_where(
    q: Tensor, k: Tensor, v: Tensor, where: Where, *, scale: float, need_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T) v for the pairs allowed, and the weights where asked for; else PyTorch's kernel.

    q [b, h, n, d], k [b, g, m, d], v [b, g, m, any] -> [b, h, n, any]; rows with nothing allowed are zero.
    """
    if need_weights:
        weights = masked_softmax(grouped_scores(q * scale, k), where.allowed())
        return grouped_mix(weights, v), weights
    if where.padding is None and where.dense is None and (where.square or not where.causal or len(where.i) == 1):
        return attend_grouped(q, k, v, scale=scale, causal=where.square and len(where.i) > 1), None
    return attend_rows(q, k, v, lambda rows: where.rows(rows).allowed(), scale=scale, causal=where.causal), None


def any_allowed(where: Where, rows: int = 512) -> Tensor | None:
    """Which queries have a key to attend to, [b, 1 or h, n, 1]; None where all have. In slices of the queries."""
    if where.padding is None and where.dense is None:
        return None
    parts = []
    for start in range(0, len(where.i), rows):
        allowed = where.rows(slice(start, start + rows)).allowed()
        assert allowed is not None
        parts.append(allowed.any(-1, keepdim=True))
    return torch.cat(parts, 2)
