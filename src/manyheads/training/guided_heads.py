"""Head patterns that a person has read off a model, put back into heads of it or of a smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import tap

# Which keys a query may attend to: [b or 1, n, n] bool, or [n, n].
Pattern = Tensor


@contextmanager
def guided_heads(
    model: nn.Module,
    patterns: Mapping[tuple[int, int], Pattern],
    *,
    form: Literal["mask", "fixed"] = "mask",
    stack: str | None = None,
) -> Iterator[None]:
    """While open, the heads that are named attend by a pattern P; (layer, head) -> P. In training as in eval mode.

        "mask"   A = softmax(S) over the keys j with P_ij, which the head still learns to weigh
        "fixed"  A_ij = P_ij / sum_j P_ij: nothing of the head's weights is learnt, its values are

    P says what may be seen beside the model's own mask (causal, padding, windows). A query with no key of its pattern
    that it may see attends as the model has it ("mask"), or evenly to all that it may see ("fixed"). P is of the batch
    that is fed, so that the form is opened for each: token_match, same_sentence and neighbours make the paper's
    patterns. All heads that are not named are left alone, and an all-true "mask" changes nothing.

    Source: Li et al., Human Guided Exploitation of Interpretable Attention Patterns, arXiv:2112.05364, and its released
    code (heads 0 to 3 of every layer: token_match, same_sentence, neighbours(n, 1), neighbours(n, -1)). There "mask"
    adds -10000 to the scores of the rest, and the synthesised form puts the 0/1 matrix in place of the scores and masks
    the rest too, which is "fixed". Its extra projected attention (PAL) is not here. ValueError: a pattern of another
    batch or length than what is fed (so with a cache: use_cache=False), heads and layers that the model has not,
    mechanisms whose weights are no softmax of scores ("mask") or whose heads do more than sum values ("fixed").
    """
    if form not in ("mask", "fixed"):
        raise ValueError(f"guided_heads: form={form!r}; want 'mask' or 'fixed'")
    if not patterns:
        raise ValueError("guided_heads: patterns is empty: give (layer, head) -> pattern")
    wrong = [key for key, pattern in patterns.items() if pattern.dtype != torch.bool or pattern.dim() not in (2, 3)]
    if wrong:
        raise ValueError(f"guided_heads: patterns of {wrong} are not [n, n] or [batch, n, n] of bool")
    by_layer: dict[int, dict[int, Tensor]] = {}
    for (layer, head), pattern in patterns.items():
        by_layer.setdefault(int(layer), {})[int(head)] = pattern if pattern.dim() == 3 else pattern[None]

    def reader(call: Any) -> Tensor:
        own = opened(call, "guided_heads")
        wanted = by_layer[own.layer]
        heads, pattern = own.check_heads(list(wanted)), _fitting(own, list(wanted.values()))
        if form == "fixed":
            own.check_values()
            even = torch.cat([_within(own, pattern, heads, rows) for rows in own.blocks(heads)], 2)
            shares = even.to(torch.promote_types(own.query.dtype, torch.float32))
            shares = shares / shares.sum(-1, keepdim=True).clamp_min(1.0)
            return own.replaced(own.weighted(shares, heads), heads)

        def change(scores: Tensor, rows: slice) -> Tensor:
            return scores.masked_fill(~_within(own, pattern, heads, rows), -torch.inf)

        return own.rescored(change, heads)

    with tap(model, reader, layers=sorted(by_layer), stack=text_stack(model, stack), kind="self"):
        yield


def _fitting(call: AttentionCall, patterns: list[Tensor]) -> Tensor:
    """[b, heads, n, m]"""
    b, n, m = len(call.query), call.query.shape[2], call.key.shape[2]
    shapes = sorted({tuple(pattern.shape) for pattern in patterns if pattern.shape not in ((b, n, m), (1, n, m))})
    if shapes:
        raise ValueError(
            f"guided_heads: patterns {shapes} do not fit {call.site.path}, which reads {b} rows of {n} queries and {m} "
            "keys: make them of the batch that is fed, and feed it whole (use_cache=False)"
        )
    return torch.stack([pattern.to(call.query.device).expand(b, n, m) for pattern in patterns], 1)


def _within(call: AttentionCall, pattern: Tensor, heads: list[int], rows: slice) -> Tensor:
    """[b, heads, rows, m]: the keys of the pattern that may be seen; where there are none, all that may be."""
    pattern, seen = pattern[:, :, rows], call.visible(rows)
    if seen is None:
        return pattern | ~pattern.any(-1, keepdim=True)
    seen = seen if seen.shape[1] == 1 else seen[:, heads]
    pattern = pattern & seen
    return pattern | (seen & ~pattern.any(-1, keepdim=True))


def pattern_relevance(
    model: nn.Module, inputs: Mapping[str, Any], pattern: Pattern, *, stack: str | None = None
) -> Tensor:
    """How much of their attention heads give to a pattern, [layers, heads]: mean over the queries of
    sum_j P_ij A_ij; 0 to 1. A pattern is accepted for a model's important heads where this is high over a corpus.

    Rows of `inputs` count by their real queries (attention_mask; rows without one in full); a query without such keys
    counts as 0, as in arXiv:2112.05364's GR. float64. The model is read as it stands, without gradients."""
    where = text_stack(model, stack)
    found = torch.zeros(len(choose(model, None, where, "self")), 0, dtype=torch.float64)
    mask = inputs.get("attention_mask")

    def reader(call: Any) -> None:
        nonlocal found
        own = opened(call, "pattern_relevance")
        chosen = _fitting(own, [pattern if pattern.dim() == 3 else pattern[None]])
        if not found.shape[1]:
            found = found.new_zeros(len(found), own.heads)
        real = torch.ones(own.query.shape[::2], device=chosen.device) if mask is None else mask.to(chosen.device)
        for rows in own.blocks():
            mass = (own.weights(rows=rows) * chosen[:, :, rows]).sum(-1)
            found[own.layer] += (mass * real[:, None, rows]).sum((0, 2)).double().cpu() / float(real.sum())

    with torch.no_grad(), tap(model, reader, stack=where, kind="self"):
        model(**inputs)
    return found


# -- patterns ----------------------------------------------------------------------------------------------------------


def token_match(ids: Tensor, ignored: Tensor | None = None) -> Pattern:
    """[b, n, n]: other places of the query's own token. ids [b, n]; ignored [b, n] bool: special tokens and whatever
    else has no match (released code: all without a letter, in its synthesised form)."""
    same = ids[:, :, None] == ids[:, None]
    same = same & ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    return same if ignored is None else same & ~ignored[:, :, None] & ~ignored[:, None]


def same_sentence(sentences: Tensor) -> Pattern:
    """[b, n, n]: keys of the query's sentence, itself included. sentences [b, n], as sentence_numbers gives them;
    those below 0 are of none."""
    return (sentences[:, :, None] == sentences[:, None]) & (sentences >= 0)[:, :, None]


def neighbours(n: int, offset: int) -> Pattern:
    """[n, n]: the `offset` tokens after the query, or before it where offset is below 0."""
    if offset == 0:
        raise ValueError(
            "neighbours: offset=0 is the query itself; want 1 for the token after it, -1 for the one before"
        )
    at = torch.arange(n)
    ahead = at[None] - at[:, None]
    return (ahead >= 1) & (ahead <= offset) if offset > 0 else (ahead <= -1) & (ahead >= offset)


def sentence_numbers(ids: Tensor, ends: int, real: Tensor | None = None) -> Tensor:
    """[b, n]: how many ends of sentences (separator tokens, full stops) stand before a token, so that an end belongs to
    what it ends. real [b, n] (the attention mask): padding is of no sentence, -1, on either side."""
    number = (ids == ends).cumsum(1) - (ids == ends).long()
    if real is None:
        return number
    real = real.bool()
    ending = (ids == ends) & real
    return (ending.cumsum(1) - ending.long()).masked_fill(~real, -1)
