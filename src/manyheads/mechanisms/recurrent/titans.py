"""Titans: a memory that learns while it reads, alone and in three ways beside attention."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.kernelised import real_tokens
from manyheads.functional.layers import call_in
from manyheads.functional.linear import widen
from manyheads.functional.online import Rates, Weights, apply, learn
from manyheads.functional.windowed import window_attention
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

FORMS = ("lmm", "mac", "mag", "mal")
EPS = 1e-6
# What MAC keeps of the segment that it is in: rows of tokens, and of what the memory told about them.
WINDOW = ("keys", "values", "told_keys", "told_values", "segments")


@register
class Titans(Mechanism):
    """A network per head, whose weights are the state, is trained on |M(k) - v|^2 by the tokens themselves.

        S_t = eta_t S_(t-1) - theta_t grad |M_c(k_t) - v_t|^2,  M_t = (1 - alpha_t) M_(t-1) + S_t,  read M_t(q_t)

    M_c: the weights before the chunk of `chunk` tokens; chunk=1 is the recurrence. eta, theta, alpha: sigmoids of the
    token, per head; q, k: silu, length one; M: `depth` layers, silu between them; P: `persistent` learned tokens.
    form: "lmm", the memory alone. "mac": in segments of `chunk`, y = Attn[P, M_c(q), x], M learns y, out y (x) M_t(y).
    "mag": y = Attn[P, window of x], out y (x) M_t(x). "mal": y = M_t(x), out Attn[P, window of y].
    y (x) m = norm(y) sigmoid(norm(m)), each norm with a weight per feature. State: 3 dim^2 depth expansion / heads
    numbers, and a window. No matrix of weights.
    Source: Behrouz et al., arXiv:2501.00663; no code was released. There a segment of MAC ends before M learns it, so
    that an output would know its later tokens; here it reads M as learnt up to itself, and attention is causal in a
    segment, whose tokens must have no padding between them. The loss is a mean over features and the memory's input is
    normed, as in the best known port, else long chunks diverge. Convolutions after q, k, v and M's own gate are left
    out; P is not written into M.
    """

    card = Card(
        name="titans",
        title="Titans: Learning to Memorize at Test Time",
        reference="arXiv:2501.00663",
        family=Family.RECURRENT,
        patterns={"causal-self"},
        time="n",
        state="1",
        example={"chunk": 4, "window": 4, "persistent": 2},
        notes="Chunks count real tokens. The memory carries every token on, so that dense masks are refused. What "
        "lies before the own segment is told by the memory alone: 63% on quick recall, 75% in five times the "
        "steps. Momentum and forgetting are per token, and per chunk in titans-pytorch, which takes half to "
        "three quarters of the time.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        form: str = "mac",
        chunk: int = 32,
        window: int = 64,
        depth: int = 2,
        expansion: int = 2,
        persistent: int = 4,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = d = self._split_heads()
        if form not in FORMS:
            raise ValueError(f"titans: form={form!r}; want one of {list(FORMS)}")
        if min(chunk, window, depth, expansion) < 1 or persistent < 0:
            raise ValueError(
                f"titans: chunk={chunk}, window={window}, depth={depth}, expansion={expansion}, persistent={persistent}"
                "; all must be at least 1, persistent at least 0"
            )
        self.form, self.chunk, self.depth = form, chunk, depth
        self.window = chunk if form == "mac" else window
        self.memory_q, self.memory_k, self.memory_v, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.rates = nn.Linear(dim, 3 * heads)
        with torch.no_grad():  # little is forgotten, and steps are small
            self.rates.bias.view(3, heads).copy_(torch.tensor([-4.0, 0.0, -2.0])[:, None])
        sizes = [d, *[expansion * d] * (depth - 1), d]
        self.first = nn.ParameterList(
            torch.randn(heads, after, before) * before**-0.5 for before, after in pairwise(sizes)
        )
        if form != "lmm":
            self.attention_q, self.attention_k, self.attention_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
            self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        if form in ("mac", "mag"):
            self.norms = nn.Parameter(torch.ones(2, dim))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                f"titans: a dense mask of shape {tuple(call.dense.shape)} was given, but the memory carries every "
                "token on; give key padding [batch, n] as the mask"
            )
        x = x if call.padding is None else x.masked_fill(~call.padding[..., None], 0.0)
        fixed: dict[str, Tensor] = {} if call.state is None else call.state.fixed
        keep = call.state is not None
        real = real_tokens(x, call.padding)
        if self.form == "mac":
            out = self._as_context(x, real, fixed, call)
        else:
            memory = self._walk(x, fixed, call, lambda _, own, take, weights: self._learn(own, take, weights))
            out = memory
            if self.form == "mag":
                out = self._gated(self._window(x, real, fixed, keep), memory)
            if self.form == "mal":
                out = self._window(memory.to(x.dtype), real, fixed, keep)
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(self.o_proj(out.to(x.dtype)))

    # -- the memory ------------------------------------------------------------------------------------------------

    def _walk(
        self,
        x: Tensor,
        fixed: dict[str, Tensor],
        call: Call,
        visit: Callable[[slice, Tensor, Tensor | None, Weights], tuple[Tensor, Weights]],
    ) -> Tensor:
        """visit(places, tokens, which of them count or None for all, weights) -> outputs [b, t, e] and weights, over
        the parts of chunks that the pass consists of.

        Without padding, rows begin their chunks together. With it each row has its own count; a stretch of `chunk`
        tokens is then visited twice, for the chunk that a row is in and for the next one.
        """
        weights, outs, n = self._weights(x, fixed), [], x.shape[1]
        count = fixed.get("count")
        if call.padding is not None and count is None:
            count = torch.full((x.shape[0],), call.seen, device=x.device)
        first = min(n, self.chunk if count is not None else self.chunk - call.seen % self.chunk)
        starts = [0, *range(first, n, self.chunk)]
        # Split and not sliced: the backward pass of a slice is as long as the whole.
        pieces = x.split([stop - start for start, stop in pairwise([*starts, n])], 1)
        for start, own in zip(starts, pieces, strict=True):
            part = slice(start, start + own.shape[1])
            if count is None:
                if (call.seen + start) % self.chunk == 0:
                    weights = weights.refreshed(None)
                out, weights = visit(part, own, None, weights)
            else:
                real = real_tokens(x, call.padding)[:, part]
                out, weights, count = self._two_chunks(part, own, real, count, weights, visit)
            outs.append(out)
        if call.state is not None:
            self._keep(fixed, weights, count)
        return torch.cat(outs, 1)

    def _two_chunks(
        self, part: slice, x: Tensor, real: Tensor, count: Tensor, weights: Weights, visit: Callable[..., Any]
    ) -> tuple[Tensor, Weights, Tensor]:
        own = (count[:, None] + real.cumsum(1) - 1) // self.chunk
        now, out = count // self.chunk, None
        for later in (0, 1):
            take = real & (own == (now + later)[:, None])
            weights = weights.refreshed(count % self.chunk == 0)
            found, weights = visit(part, x, take, weights)
            out = found if out is None else torch.where(take[..., None], found, out)
            count = count + take.sum(1)
        assert out is not None
        return out, weights, count

    def _weights(self, x: Tensor, fixed: dict[str, Tensor]) -> Weights:
        if "now_0" in fixed:
            return Weights(*([fixed[f"{kind}_{i}"] for i in range(self.depth)] for kind in Weights._fields))
        wide = torch.promote_types(x.dtype, torch.float32)
        now = [first.to(wide).expand(x.shape[0], -1, -1, -1) for first in self.first]
        return Weights(now, [torch.zeros_like(matrix) for matrix in now], now)

    def _keep(self, fixed: dict[str, Tensor], weights: Weights, count: Tensor | None) -> None:
        for kind, matrices in zip(Weights._fields, weights, strict=True):
            fixed.update({f"{kind}_{i}": matrix.clone() for i, matrix in enumerate(matrices)})
        if count is not None:
            fixed["count"] = count

    def _learn(self, x: Tensor, take: Tensor | None, weights: Weights) -> tuple[Tensor, Weights]:
        """x [b, t, e] is written and read: [b, t, e]."""
        x = _normed(x)
        q, k, v = self._query(x), self._unit(self._project(x, self.memory_k)), self._project(x, self.memory_v)
        forget, momentum, step = call_in(self.rates, x).unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)
        there = None if take is None else take[:, None].to(x.dtype)
        rates = Rates(F.logsigmoid(-forget), F.logsigmoid(momentum), step.sigmoid(), there)
        read, weights = learn(weights, q, k, v, rates)
        return read.transpose(1, 2).flatten(-2), weights

    def _query(self, normed: Tensor) -> Tensor:
        return self._unit(self._project(normed, self.memory_q))

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(F.silu(x), dim=-1, eps=EPS)

    # -- attention -------------------------------------------------------------------------------------------------

    def _as_context(self, x: Tensor, real: Tensor, fixed: dict[str, Tensor], call: Call) -> Tensor:
        """Segment by segment: what the memory holds of a token's query is a key and a value beside the token's own."""
        q, own_k, own_v = (self._project(widen(x), p) for p in (self.attention_q, self.attention_k, self.attention_v))
        keys, values = self._always(q)
        segments = self._segments(real, fixed.get("count"), call)

        def visit(part: slice, own: Tensor, take: Tensor | None, weights: Weights) -> tuple[Tensor, Weights]:
            told = apply(weights.anchor, self._query(_normed(own))).transpose(1, 2).flatten(-2)
            rows = {
                "keys": own_k[:, :, part],
                "values": own_v[:, :, part],
                "told_keys": self._project(told, self.attention_k),
                "told_values": self._project(told, self.attention_v),
            }
            ids = segments[:, part]
            ids = ids if take is None else ids.masked_fill(~take, -1)
            seen = _behind(window, {**rows, "segments": ids})
            before = seen["segments"]
            size, past = ids.shape[1], before.shape[1] - ids.shape[1]
            allowed = ids[:, :, None] == before[:, None]
            allowed = allowed & torch.ones(size, past + size, dtype=torch.bool, device=x.device).tril(past)
            allowed = F.pad(torch.cat((allowed, allowed), -1), (keys.shape[1], 0), value=True)
            k = torch.cat((keys.expand(x.shape[0], -1, -1, -1), seen["told_keys"], seen["keys"]), 2)
            v = torch.cat((values.expand(x.shape[0], -1, -1, -1), seen["told_values"], seen["values"]), 2)
            weigh = masked_softmax(q[:, :, part] @ k.mT * self.head_dim**-0.5, allowed[:, None])
            y = (weigh @ v).transpose(1, 2).flatten(-2)
            memory, weights = self._learn(y, take, weights)
            rows["segments"] = ids
            if take is not None and not waiting:
                waiting.update(rows)  # the same tokens are visited once more, for the next segment
            else:
                merged = {name: _either(take, t, waiting[name]) for name, t in rows.items()} if waiting else rows
                waiting.clear()
                window.update(_newest(_behind(window, merged), self.chunk - 1))
            return self._gated(y, memory), weights

        window: dict[str, Tensor] = {name: fixed[name] for name in WINDOW if name in fixed}
        waiting: dict[str, Tensor] = {}
        out = self._walk(x, fixed, call, visit)
        if call.state is not None:
            fixed.update({name: t.clone() for name, t in window.items()})
        return out

    def _segments(self, real: Tensor, count: Tensor | None, call: Call) -> Tensor:
        """The number of each token's segment [b, n], -1 where there is no token."""
        before = torch.full_like(real[:, 0], call.seen, dtype=torch.long) if count is None else count
        return ((before[:, None] + real.cumsum(1) - 1) // self.chunk).masked_fill(~real, -1)

    def _window(self, x: Tensor, real: Tensor, fixed: dict[str, Tensor], keep: bool) -> Tensor:
        """Attention of each token to the newest `window` ones and to the persistent tokens."""
        q, k, v = (self._project(widen(x), p) for p in (self.attention_q, self.attention_k, self.attention_v))
        held: dict[str, Tensor] = {name: fixed[name] for name in ("keys", "values", "real") if name in fixed}
        fresh: dict[str, Tensor] = {"keys": k, "values": v, "real": real}
        rows = _behind(held, fresh)
        before = self.window - 1
        if not held:
            rows = _newest(rows, before + x.shape[1])
        if keep:
            fixed.update({name: t.clone() for name, t in _newest(rows, before).items()})
        mixed = window_attention(
            q,
            rows["keys"],
            rows["values"],
            rows["real"],
            self._always(q),
            window=self.window,
            scale=self.head_dim**-0.5,
        )
        return mixed.transpose(1, 2).flatten(-2)

    def _always(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [h, p, d] of the persistent tokens."""
        if self.persistent is None:
            nothing = like.new_zeros(self.heads, 0, self.head_dim)
            return nothing, nothing
        tokens = self.persistent.to(like.dtype)[None]
        return self._project(tokens, self.attention_k)[0], self._project(tokens, self.attention_v)[0]

    def _gated(self, y: Tensor, memory: Tensor) -> Tensor:
        one, other = self.norms.to(y.dtype)
        return _normed(y) * one * (_normed(memory) * other).sigmoid()

    def _project(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """[b, t, e] -> [b, h, t, d], in the dtype of x: the memory is in at least float32, whatever the module is."""
        return call_in(layer, x).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _normed(x: Tensor) -> Tensor:
    x = widen(x)
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _time(t: Tensor) -> int:
    return 1 if t.ndim == 2 else 2


def _behind(held: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows held, and the new ones behind them: [b, h, m, d] or [b, m]."""
    return {name: torch.cat((held[name], t), _time(t)) if held else t for name, t in rows.items()}


def _newest(rows: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The last `count` rows; in front of fewer, rows that no query may see."""
    found = {}
    for name, t in rows.items():
        axis = _time(t)
        size = t.shape[axis]
        t = t.narrow(axis, max(size - count, 0), min(size, count))
        short = count - t.shape[axis]
        none = -1 if name == "segments" else 0
        found[name] = F.pad(t, (short, 0) if axis == 1 else (0, 0, short, 0), value=none)
    return found


def _either(take: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    assert take is not None
    return torch.where(take if new.ndim == 2 else take[:, None, :, None], new, old)
