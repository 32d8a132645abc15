"""Linear attention: a similarity that is an inner product of features, so that keys and values sum into a memory.

b batch, h heads, n queries, m keys, d head dim, f features, w = d + 1 values with a one at the end where the sum of
weights is wanted, and w = d where it is not. Three forms of one function: the matrix [n, m] (masks, weights), the
recurrence (a chunk of one token) and the chunked form, matrix inside a chunk and recurrence between chunks. Features
are made chunk by chunk, at least in float32, under autocast too: those of a long sequence would be its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.functional.precision import in_own_dtype
from manyheads.inner import Across

# Tokens whose matrix is built at once.
CHUNK = 128


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Kernel:
    """The similarity of a query and a key: features(a) . features(b) = value(a . b) with a = query(q), b = key(k).

    floor: rows that see a key have a sum of weights above it, and are divided by that. None: they are not divided.
    """

    query: Callable[[Tensor], Tensor] = _same
    key: Callable[[Tensor], Tensor] = _same
    features: Callable[[Tensor], Tensor] = _same
    value: Callable[[Tensor], Tensor] = _same
    floor: float | None = 0.0


def taylor_features(x: Tensor) -> Tensor:
    """[1, x, x (x) x / sqrt(2)]: 1 + d + d^2 features, whose inner product is taylor_value."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat((torch.ones_like(x[..., :1]), x, squares), -1)


def taylor_value(s: Tensor) -> Tensor:
    """exp(s) to second order, ((1 + s)^2 + 1) / 2: never below a half."""
    return 1 + s + 0.5 * s * s


def widen(tensor: Tensor) -> Tensor:
    """At least float32: sums over the whole past do not fit into less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def checked_chunk(name: str, chunk: int) -> int:
    """The constructor argument `chunk`, or a ValueError."""
    if chunk < 1:
        raise ValueError(f"{name}: chunk={chunk} must be at least 1: so many tokens are computed at once")
    return chunk


def needs_matrix(name: str, *, seen: int, dense: Tensor | None, need_weights: bool) -> bool:
    """Whether a self-attention pass must build [n, m]. Raises ValueError where keys of earlier passes are gone."""
    if dense is None and not need_weights:
        return False
    if seen:
        what = "need_weights=True" if dense is None else f"a dense mask of shape {tuple(dense.shape)}"
        raise ValueError(
            f"{name}: {what} was given with a state of {seen} tokens, of which only a running summary is kept; want a "
            "key padding mask [batch, n], or all tokens in one pass without a state"
        )
    return True


def hide(tensor: Tensor, padding: Tensor | None) -> Tensor:
    """Zeros in the rows of [b, h, m, .] that padding [b, m] (True = real) says are not there."""
    return tensor if padding is None else tensor.masked_fill(~padding[:, None, :, None], 0.0)


def allowed_pairs(q: Tensor, k: Tensor, *, causal: bool, padding: Tensor | None, dense: Tensor | None) -> Tensor | None:
    """Boolean, broadcasting to [b, h, n, m]; None where every query may meet every key."""
    found = dense
    if padding is not None:
        found = padding[:, None, None, :] if found is None else found & padding[:, None, None, :]
    if causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        found = past if found is None else found & past
    return found


# -- the matrix --------------------------------------------------------------------------------------------------------


@in_own_dtype
def matrix_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    *,
    causal: bool,
    padding: Tensor | None = None,
    dense: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, h, n, .], k and v [b, h, m, .] -> mixed [b, h, n, d] and the weights [b, h, n, m]: the specification."""
    q, k, v = widen(q), widen(hide(k, padding)), widen(hide(v, padding))
    weights = kernel.value(kernel.query(q) @ kernel.key(k).mT)
    allowed = allowed_pairs(q, k, causal=causal, padding=padding, dense=dense)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    if slopes is not None:
        weights = weights * _decays(_ticks(q, padding), slopes)
    if kernel.floor is not None:
        weights = weights / _divisor(weights.sum(-1, keepdim=True), kernel.floor)
    return weights @ v, weights


# -- without causality -------------------------------------------------------------------------------------------------


@in_own_dtype
def summarise(
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    *,
    padding: Tensor | None = None,
    slopes: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """k, v [b, h, m, .] -> the memory [b, h, f, w]: values summed under their keys' features. slopes [h]: each as it
    has decayed by the last token."""
    memory: Tensor | None = None
    for keys, values, real in _chunks(chunk, k, v, padding=padding):
        keys, values = _written(keys, values, kernel, real)
        age = None if slopes is None else _ticks(keys, real)
        memory = _remember(memory, kernel.features(keys), values, age, slopes)
    assert memory is not None
    return memory


@in_own_dtype
def recall(q: Tensor, memory: Tensor, kernel: Kernel, *, chunk: int = CHUNK) -> Tensor:
    """What every query [b, h, n, .] reads from a memory [b, h, f, w]: [b, h, n, d]."""
    queries = (kernel.query(widen(part)) for part in q.split(chunk, 2))
    return _joined([_divided(kernel.features(a) @ memory, kernel) for a in queries])


# -- with causality ----------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """mixed [b, h, n, d], at least float32. memory [b, h, f, w] of all tokens so far, where it was wanted. weights
    [b, h, n, m], where the matrix was."""

    mixed: Tensor
    memory: Tensor | None = None
    weights: Tensor | None = None


@in_own_dtype
def causal_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    *,
    memory: Tensor | None = None,
    padding: Tensor | None = None,
    slopes: Tensor | None = None,
    keep: bool = False,
    chunk: int = CHUNK,
) -> Read:
    """Sum over j <= i of exp(-slope (i - j)) similarity(q_i, k_j) v_j for q, k, v [b, h, n, .], in chunks.

    memory: of the tokens before. padding [b, n]: tokens that are not there are neither read nor age the others.
    slopes [h]: decay per token; none without it. keep: the memory is wanted afterwards.
    """
    outs, alike, last = [], None, (q.shape[2] - 1) // chunk
    if slopes is not None and padding is None:
        # Without padding all chunks age alike, the last and shorter one as the beginning of one.
        alike = _decays(_ticks(widen(q[:, :, :chunk]), None), slopes)
    for count, (queries, keys, values, real) in enumerate(_chunks(chunk, q, k, v, padding=padding)):
        queries = kernel.query(widen(queries))
        keys, values = _written(keys, values, kernel, real)
        inner = kernel.value(queries @ keys.mT).tril()
        age = None
        if slopes is not None:
            age = _ticks(queries, real)
            size = inner.shape[-1]
            inner = inner * (_decays(age, slopes) if alike is None else alike[..., :size, :size])
        sums = inner @ values
        if memory is not None:
            past = kernel.features(queries) @ memory
            sums = sums + (past if age is None else past * _faded(age, slopes))
        outs.append(_divided(sums, kernel))
        if keep or count < last:
            memory = _remember(memory, kernel.features(keys), values, age, slopes)
    return Read(_joined(outs), memory)


def self_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    *,
    causal: bool,
    matrix: bool,
    padding: Tensor | None = None,
    dense: Tensor | None = None,
    memory: Tensor | None = None,
    slopes: Tensor | None = None,
    keep: bool = False,
    chunk: int = CHUNK,
    across: Across | None = None,
) -> Read:
    """A pass of self-attention. matrix: by the matrix, which alone obeys a dense mask and gives weights. across: the
    tokens are part of a sequence, of which this reads the rest."""
    if across is not None:
        return Read(across.recall(q, k, v, kernel, causal=causal, slopes=slopes))
    if causal and (keep or not matrix):
        read = causal_read(q, k, v, kernel, memory=memory, padding=padding, slopes=slopes, keep=keep, chunk=chunk)
        memory = read.memory
        if not matrix:
            return read
    if matrix:
        mixed, weights = matrix_read(q, k, v, kernel, causal=causal, padding=padding, dense=dense, slopes=slopes)
        return Read(mixed, memory, weights)
    return Read(recall(q, summarise(k, v, kernel, padding=padding, chunk=chunk), kernel, chunk=chunk))


def _chunks(chunk: int, *tensors: Tensor, padding: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Parts of tensors [b, h, n, .] and of the padding, or None for it. They are split and not sliced: the backward
    pass of a slice is as long as the whole."""
    parts = [tensor.split(chunk, 2) for tensor in tensors]
    real = [None] * len(parts[0]) if padding is None else padding.split(chunk, 1)
    return zip(*parts, real, strict=True)


def _written(k: Tensor, v: Tensor, kernel: Kernel, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """A chunk of mapped keys, and of values with a one behind them where weights are to be summed."""
    keys, values = kernel.key(widen(hide(k, real))), widen(v)
    if kernel.floor is not None:
        values = torch.cat((values, torch.ones_like(values[..., :1])), -1)
    return keys, hide(values, real)


def _remember(
    memory: Tensor | None, k: Tensor, v: Tensor, age: Tensor | None = None, slopes: Tensor | None = None
) -> Tensor:
    """k: features. Keys age to the end of the chunk and the memory by the whole chunk: no exponent is positive."""
    if age is None:
        return k.mT @ v if memory is None else memory + k.mT @ v
    last = age[:, -1:]
    new = (k * _faded(last - age, slopes)).mT @ v
    return new if memory is None else memory * _faded(last, slopes) + new


def _divisor(total: Tensor, floor: float) -> Tensor:
    """One for rows that see no key: their sums are zero and stay so."""
    return torch.where(total > floor, total, torch.ones_like(total))


def _divided(sums: Tensor, kernel: Kernel) -> Tensor:
    return sums if kernel.floor is None else sums[..., :-1] / _divisor(sums[..., -1:], kernel.floor)


def _joined(outs: list[Tensor]) -> Tensor:
    """[b, h, chunk, d] each -> [b, h, n, d], laid out as [b, n, h, d]: joining the heads later moves nothing."""
    return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2)


def _ticks(x: Tensor, padding: Tensor | None) -> Tensor:
    """Real tokens up to and with each of [b, h, n, d]: [1 or b, n], in the dtype of x."""
    if padding is None:
        return torch.arange(1, x.shape[2] + 1, device=x.device, dtype=x.dtype)[None]
    return padding.cumsum(1).to(x.dtype)


def _decays(age: Tensor, slopes: Tensor) -> Tensor:
    """age [1 or b, n] -> exp(-slope (age_i - age_j)) for j <= i, and one for later j: [1 or b, h, n, n]."""
    gaps = (age[:, None, :, None] - age[:, None, None, :]).clamp(min=0.0)
    return (-slopes[:, None, None] * gaps).exp()


def _faded(age: Tensor, slopes: Tensor | None) -> Tensor:
    """What is left after `age` [1 or b, n] tokens: [1 or b, h, n, 1]."""
    assert slopes is not None
    return (-slopes[:, None, None] * age[:, None, :, None]).exp()
