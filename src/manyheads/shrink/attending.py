"""A layer's queries at one group of its heads: the shortest way that what is held and seen allows."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.hosts.attend import (
    Mask,
    Scoring,
    causal_attention,
    lies_by_feature,
    masked_attention,
    one_query,
    two_products,
    with_bias,
)
from manyheads.hosts.visibility import Visibility
from manyheads.shrink.group import Group

# Queries that look at one slice of a counted buffer, where a window or a chunk needs a mask.
_BAND = 512


def sinks_of(scoring: Scoring, group: Group, repeat: int) -> Tensor | None:
    if scoring.sinks is None:
        return None
    return scoring.sinks.view(-1, repeat).index_select(0, group.index).flatten()


def attend_group(queries: Tensor, group: Group, scoring: Scoring, seen: Visibility) -> tuple[Tensor, Tensor | None]:
    """The output, and the weights of a single query where they were made."""
    if group.codec is not None:
        return group.codec.attend(group, queries, scoring, seen), None
    n, m, counted = queries.shape[3], group.length, group.first is not None
    bias, within = group.bias(), seen.window is None or (counted and m <= seen.window)
    sees_all = n == 1 and group.filled and seen.plain and seen.padding is None and within
    if sees_all and bias is None and scoring.plain and lies_by_feature(group.rows["keys"]):
        return two_products(queries, *group.matrices(), scoring.scale)
    keys, values = group.view("keys"), group.view("values")
    if counted and n == m and scoring.plain and seen.only_causal(n):
        return causal_attention(queries, keys, values, scoring.scale), None
    if sees_all:
        return one_query(queries, keys, values, scoring, with_bias(None, bias))
    if n == 1:
        seen_of = with_bias(seen.allowed(slice(0, 1), group.slots()), bias)
        return one_query(queries, keys, values, scoring, seen_of)
    if counted and seen.plain:
        return _bands(queries, group, scoring, seen), None
    slots = group.slots()
    masked = masked_attention(queries, keys, values, scoring, lambda rows: with_bias(seen.allowed(rows, slots), bias))
    return masked, None


def _bands(queries: Tensor, group: Group, scoring: Scoring, seen: Visibility) -> Tensor:
    """Counted slots: every block of queries reads only the keys between its window's start and its own last token."""
    assert group.first is not None
    keys, values, slots = group.view("keys"), group.view("values"), group.slots()
    out = []
    for start in range(0, queries.shape[3], _BAND):
        stop = min(start + _BAND, queries.shape[3])
        low = 0 if seen.window is None else max(0, start + seen.offset - seen.window + 1 - group.first)
        high = max(low + 1, min(group.length, stop + seen.offset - group.first))
        here = slice(low, high)
        out.append(
            masked_attention(
                queries[:, :, :, start:stop],
                keys[:, :, here],
                values[:, :, here],
                scoring,
                _shifted(seen, start, slots[:, :, here]),
            )
        )
    return out[0] if len(out) == 1 else torch.cat(out, 3)


def _shifted(seen: Visibility, start: int, slots: Tensor) -> Mask:
    """The mask of a block that begins at query `start`."""
    return lambda rows: seen.allowed(slice(rows.start + start, rows.stop + start), slots)
