"""MiniLMv2: a student learns how its teacher's queries, keys and values relate to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.functional.precision import own_dtype


def relation_loss(
    student: Tensor, teacher: Tensor, *, heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """How far the student's relations are from the teacher's, of one kind (queries, keys, or values).

        R(X)_a = softmax(X_a X_a^T / sqrt(d_r)),   d_r = width of X / heads, for every relation head a
        loss = mean over sequences of 1 / (heads n) sum_a sum_i KL(R(teacher)_a,i || R(student)_a,i)

    student [b, n, e_s], teacher [b, n, e_t]: all heads' vectors side by side. heads: relation heads, any number that
    divides both widths; nobody's attention heads. mask: [b, n], True = real; padding on either side, n is the number
    of real tokens. causal: a token is related to itself and those before it. Gradients reach the student only.
    ValueError for widths or shapes that do not fit.

    Source: Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, arXiv:2012.15828, equations 5 to 8.
    Rows without a real token count as sequences whose loss is 0. The paper's models look both ways; causal is ours.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"relation_loss: student {list(student.shape)} and teacher {list(teacher.shape)} differ in b, n"
        )
    for who, x in (("student", student), ("teacher", teacher)):
        if heads < 1 or x.shape[-1] % heads:
            raise ValueError(f"relation_loss: {heads} relation heads do not divide the {who}'s width {x.shape[-1]}")
    b, n = student.shape[:2]
    real = torch.ones(b, n, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    if real.shape != (b, n):
        raise ValueError(f"relation_loss: mask {list(real.shape)}; want [{b}, {n}], True = real")
    seen = real[:, None, :] & real[:, :, None]
    if causal:
        seen = seen & torch.ones(n, n, dtype=torch.bool, device=seen.device).tril()
    own, other = _log_relation(student, heads, seen), _log_relation(teacher.detach(), heads, seen)
    each = (other.exp() * (other - own)).sum(-1)
    rows = each.masked_fill(~real[:, None], 0.0).sum((1, 2)) / (heads * real.sum(1).clamp_min(1))
    return rows.mean()


def minilm_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The sum of `relation_loss` over pairs: (queries, keys, values) of the student and of the teacher. The widths of
    the kinds may differ, as with fewer key/value heads."""
    if not len(student) or len(student) != len(teacher):
        raise ValueError(
            f"minilm_loss: {len(student)} kinds of vectors from the student, {len(teacher)} from the teacher"
        )
    return torch.stack(
        [relation_loss(a, b, heads=heads, mask=mask, causal=causal) for a, b in zip(student, teacher, strict=True)]
    ).sum()


def _log_relation(x: Tensor, heads: int, seen: Tensor) -> Tensor:
    """[b, heads, n, n], in float32 at least, under autocast too. What is not seen has no share, 0 for a logarithm."""
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (heads, -1)).transpose(1, 2)
    with own_dtype(parts):
        scores = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    hidden = ~seen[:, None]
    # A row that sees nothing would give NaN; one that is finite keeps gradients finite too.
    log = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)
    return log.masked_fill(hidden, 0.0)
