"""Attention where several query heads share a key/value head, without ever expanding keys or values.

b batch, h query heads, g key/value heads, r = h / g, n queries, m keys, d head dim. Query head h reads key head h // r.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.functional.lengths import spans

# Rows of a dense mask that are built at once: bounds the memory of a masked pass to this many rows of length m.
MASK_ROWS = 512


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """q [b, h, n, d], k [b, g, m, d] -> unscaled scores [b, h, n, m]."""
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    return (q.reshape(b, g, h // g * n, d) @ k.transpose(-1, -2)).view(b, h, n, m)


def grouped_mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights [b, h, n, m], v [b, g, m, d] -> [b, h, n, d]."""
    (b, h, n, m), (g, d) = weights.shape, (v.shape[1], v.shape[3])
    return (weights.reshape(b, g, h // g * n, m) @ v).view(b, h, n, d)


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis, at least in float32; rows with nothing allowed are zero."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if allowed is None:
        return scores.softmax(-1, dtype=wide).to(scores.dtype)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1, dtype=wide)
    return weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0).to(scores.dtype)


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False) -> Tensor:
    """softmax(scale q k^T) v with PyTorch's kernel. causal: n == m and key j is seen by queries i >= j."""
    (b, h, n, d), g = q.shape, k.shape[1]
    if h == g:
        if causal:  # traced with a length that may change, it is a symbol, which the kernel does not take
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if not causal or n == 1:
        # The heads of a group stand in line as queries of the one head that they share.
        packed = q.reshape(b, g, h // g * n, d)
        return F.scaled_dot_product_attention(packed, k, v, scale=scale).view(b, h, n, v.shape[-1])
    if g == 1:  # a view, and no copy
        k, v = (t.expand(-1, _copies(q), -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != h)


def _copies(q: Tensor) -> int:
    """As how many heads the causal kernel is shown the one key head that all of q [b, h, n, d] share.

    A CPU's backward pass gives one key head of one row to one core, and makes a gradient of each head that it is shown:
    the fewest that leave no core with more than one and a half times its part.
    """
    if torch.compiler.is_compiling() or q.device.type != "cpu":  # traced, neither the batch nor the cores are known
        return q.shape[1]
    rows, cores = q.shape[0], torch.get_num_threads()
    divisors = (copies for copies in range(1, q.shape[1]) if q.shape[1] % copies == 0)
    return next((c for c in divisors if 2 * cores * -(-rows * c // cores) <= 3 * rows * c), q.shape[1])


def attend_masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, scale: float) -> Tensor:
    """The same under a mask that broadcasts to [b, h, n, m]; rows with nothing allowed are zero."""
    (b, h, n, d), g = q.shape, k.shape[1]
    if h == g:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    allowed = allowed[(None,) * (4 - allowed.ndim)]  # an index rule on its own has no axis for the batch
    each = q.view(b, g, h // g, n, d)
    rules = (
        allowed.expand(-1, h, -1, -1).view(-1, g, h // g, *allowed.shape[2:])
        if allowed.shape[1] > 1
        else allowed[:, None]
    )
    # One pass per query head of a group: keys stay as they are, and the mask is not repeated.
    parts = [
        F.scaled_dot_product_attention(each[:, :, r], k, v, attn_mask=rules[:, :, r % rules.shape[2]], scale=scale)
        for r in range(h // g)
    ]
    return torch.stack(parts, 2).view(b, h, n, v.shape[-1])


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, allowed: Callable[[slice], Tensor | None], *, scale: float, causal: bool
) -> Tensor:
    """The same where the mask of a slice of the queries is made when it is needed, [b or 1, h or 1, rows, m] or None
    for everything. causal: the last query stands at the last key, and no mask allows a key behind its query."""
    n, m, parts = q.shape[2], k.shape[2], []
    for rows in spans(n, MASK_ROWS):
        reach = m - n + rows.stop if causal else m
        part, keys, values, mask = q[:, :, rows], k[:, :, :reach], v[:, :, :reach], allowed(rows)
        if mask is None:
            parts.append(attend_grouped(part, keys, values, scale=scale))
        else:
            parts.append(attend_masked(part, keys, values, mask[..., :reach], scale=scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
