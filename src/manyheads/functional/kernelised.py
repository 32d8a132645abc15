"""A pass of linear attention around functional.linear: masks, weights, the state of self-attention and of a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from manyheads.functional.linear import CHUNK, Kernel, Read, matrix_read, needs_matrix, recall, self_read, summarise
from manyheads.mechanism import Call, Mechanism, Result

# Tokens of a long causal pass that are worked on at once: what lies between stays in the cache.
STRETCH = 2048


def in_stretches(module: Mechanism, x: Tensor, call: Call) -> Result | None:
    """A long pass of causal self-attention as several with a state; None where the pass is short, or must be one."""
    if not module.causal or x.shape[1] <= STRETCH or call.dense is not None or call.need_weights or call.across:
        return None
    state = module.init_state(x.shape[0]) if call.state is None else call.state
    outputs = []
    for start in range(0, x.shape[1], STRETCH):
        now = slice(start, start + STRETCH)
        padding, positions = (None if t is None else t[:, now] for t in (call.padding, call.positions))
        part = replace(call, padding=padding, positions=positions, state=state)
        outputs.append(module.attend(x[:, now], None, part).output)
    return Result(torch.cat(outputs, 1))


def read_self(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    call: Call,
    *,
    causal: bool,
    slopes: Tensor | None = None,
    chunk: int = CHUNK,
) -> Read:
    """q, k, v [b, h, n, .] of the tokens of this pass; continues and updates the memory of the state, if there is one.
    The caller advances the state."""
    state = call.state
    read = self_read(
        q,
        k,
        v,
        kernel,
        causal=causal,
        matrix=needs_matrix(name, seen=call.seen, dense=call.dense, need_weights=call.need_weights),
        padding=call.padding,
        dense=call.dense,
        memory=None if state is None else state.fixed.get("memory"),
        slopes=slopes,
        keep=state is not None,
        chunk=chunk,
        across=call.across,
    )
    if state is not None:
        assert read.memory is not None
        state.fixed["memory"] = read.memory
    return read


def read_context(
    name: str,
    q: Tensor,
    context: Tensor,
    keys: Callable[[Tensor], tuple[Tensor, Tensor]],
    kernel: Kernel,
    call: Call,
    *,
    chunk: int = CHUNK,
) -> Read:
    """q [b, h, n, .] reads the context [b, m, e], of which keys makes k and v [b, h, m, .]. Keys have no order, so that
    causal and other queries read the same memory; a state makes it once."""
    held = {} if call.state is None else call.state.context
    if "memory" not in held:
        k, v = keys(context)
        held["memory"] = summarise(k, v, kernel, padding=call.padding, chunk=chunk)
        # No bytes, only a shape: how long the context was.
        held["length"] = context.new_empty(context.shape[0], context.shape[1], 0)
    if held["length"].shape[1] != context.shape[1]:
        raise ValueError(
            f"{name}: the state was made for a context of {held['length'].shape[1]} tokens, this one has "
            f"{context.shape[1]}; start a new state for a new context"
        )
    if not call.need_weights and call.dense is None:
        return Read(recall(q, held["memory"], kernel, chunk=chunk))
    k, v = keys(context)
    mixed, weights = matrix_read(q, k, v, kernel, causal=False, padding=call.padding, dense=call.dense)
    return Read(mixed, None, weights)


def joined(mixed: Tensor, like: Tensor) -> Tensor:
    """[b, h, n, d] -> [b, n, h d], in the dtype of `like`."""
    return mixed.transpose(1, 2).flatten(-2).to(like.dtype)


def shown(weights: Tensor | None, call: Call, like: Tensor) -> Tensor | None:
    """The weights in the dtype of `like`, where they were asked for; a dense mask alone makes them too."""
    return weights.to(like.dtype) if call.need_weights and weights is not None else None


def real_tokens(x: Tensor, padding: Tensor | None) -> Tensor:
    """padding [b, n], or all True."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if padding is None else padding
