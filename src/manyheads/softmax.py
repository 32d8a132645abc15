"""The shell that pairwise mechanisms differ from. Read this first.

    project -> position -> score -> select -> normalise -> mix -> output

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d head dim, e model dim. A mechanism overrides one
to three of these stages, or `mask_mod` / `score_mod` where all it changes is an index rule. With nothing of score,
normalise and mix overridden no [n, m] matrix of scores is ever held: the pass is `scaled_dot_product_attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.functional.banded import banded_attention
from manyheads.functional.grouped import (
    attend_grouped,
    attend_rows,
    grouped_mix,
    grouped_scores,
    masked_softmax,
)
from manyheads.functional.layers import RMSNorm, rms_norm
from manyheads.functional.lengths import within
from manyheads.functional.rotary import Rotary, rotate
from manyheads.functional.where import Where as Where
from manyheads.inner import Across, Inner
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.shell import PROJECTIONS, Shell
from manyheads.state import State

STAGES = ("project", "position", "score", "select", "normalise", "mix", "output")


class SoftmaxAttention(Mechanism):
    """softmax(q k^T / sqrt(d)) v per head, in stages (Vaswani et al., arXiv:1706.03762).

    kv_heads: key/value heads, each shared by heads / kv_heads query heads. rotary: turns q and k by position. shell: a
    `Shell` or a mapping, sizes and norms of a hosted checkpoint; taken by every mechanism that projects as this does,
    without its naming it.
    """

    head_windows: Sequence[int] | None = None  # of each head, where the newest tokens are all that it selects
    span: int | None = None  # no query looks further back than this many tokens, itself included: bounds the state
    eager: ClassVar[bool] = False  # a stage that needs the score matrix is overridden
    ruled: ClassVar[bool] = False  # a stage that says which keys count is overridden
    shares_kv: ClassVar[bool] = True  # the stages take fewer key/value heads than query heads
    shell: Shell = Shell()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        changed = set(changed_stages(cls))
        cls.eager = bool({"score", "score_mod", "normalise", "mix"} & changed)
        cls.ruled = bool({"select", "mask_mod"} & changed)

    @classmethod
    def shared_arguments(cls) -> Mapping[str, inspect.Parameter]:
        hosts = cls.project.__module__ == cls.projected.__module__ == __name__  # the shell's own
        return {"shell": inspect.Parameter("shell", inspect.Parameter.KEYWORD_ONLY, default=None)} if hosts else {}

    def take_shared(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if values.get("shell") is None:
            return {}
        if type(self).project is not SoftmaxAttention.project:
            raise ValueError(
                f"{self.card.name}: has projections of its own, and no place for shell={values['shell']!r}"
            )
        shell = Shell.of(self.card.name, values["shell"])
        parts = ("softcap", "window", "out_norm")
        strange = [part for part in parts if getattr(shell, part) and not type(self).has_place(part)]
        if strange:
            own = "output" if strange[0] == "out_norm" else "scores"
            raise ValueError(f"{self.card.name}: has no {own} of the shell's, and no place for {strange[0]}")
        self.__dict__["shell"] = shell
        return {"shell": self.shell.config}

    @classmethod
    def has_place(cls, part: str) -> bool:
        """Whether the passes of this mechanism go by the shell's `softcap`, `window` or `out_norm`."""
        stage = {"window": ["select"], "out_norm": ["output"]}.get(part, [])
        return {"attend", *stage}.isdisjoint(changed_stages(cls))

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        kv_heads: int | None = None,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        shell, name = self.shell, self.card.name
        self.head_dim = self._split_heads() if shell.head_dim is None else shell.head_dim
        if None not in (kv_heads, shell.kv_heads) and kv_heads != shell.kv_heads:
            raise ValueError(f"{name}: kv_heads={kv_heads}, and {shell.kv_heads} in the shell; give one of them")
        self.kv_heads = next((count for count in (kv_heads, shell.kv_heads) if count is not None), heads)
        if self.kv_heads != heads and not self.shares_kv:
            raise ValueError(f"{name}: wants a key/value head for every query head, {heads}; got {self.kv_heads}")
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"{name}: heads={heads} is not a multiple of kv_heads={self.kv_heads}")
        self.rotary = Rotary.of(rotary)
        if self.rotary:
            self.rotary.features(self.head_dim)
        self.scale = self.head_dim**-0.5 if shell.scale is None else shell.scale
        self.source_dim = shell.source_dim
        if shell.window is not None:
            if not causal:
                raise ValueError(f"{name}: shell: window={shell.window} is of causal layers; want causal=True")
            self.span = shell.window
        wide = dim if shell.source_dim is None else shell.source_dim
        widths = {"q": heads * self.head_dim, "k": self.kv_heads * self.head_dim, "v": self.kv_heads * self.head_dim}
        biased = {key: bias if shell.bias is None else shell.bias.get(key, False) for key in PROJECTIONS}
        self.q_proj = nn.Linear(dim, widths["q"], bias=biased["q"])
        self.k_proj = nn.Linear(wide, widths["k"], bias=biased["k"])
        self.v_proj = nn.Linear(wide, widths["v"], bias=biased["v"])
        self.o_proj = nn.Linear(widths["q"], dim, bias=biased["o"])
        if shell.qk_norm:
            sizes = (self.head_dim, self.head_dim) if shell.qk_norm == "head" else (widths["q"], widths["k"])
            self.q_norm, self.k_norm = (rms_norm(size, shell.norm_eps, shell.norm_offset) for size in sizes)
        if shell.out_norm:
            self.out_norm = RMSNorm(widths["q"], eps=shell.norm_eps)

    # -- stages ----------------------------------------------------------------------------------------------------

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, n, e], source [b, m, e] (x, or the context) -> q [b, h, n, d], k [b, g, m, d], v [b, g, m, d]."""
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        if self.shell.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self._per_head(q), self._per_head(k), self._per_head(v)
        if self.shell.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _per_head(self, features: Tensor) -> Tensor:
        """[b, n, h * d] -> [b, n, h, d]; `unflatten` takes half as long again."""
        b, n, wide = features.shape
        return features.reshape(b, n, wide // self.head_dim, self.head_dim)

    def projected(self, x: Tensor, source: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """`project`, in the place of which stands what projects by something that the call was given by name."""
        return self.project(x, source)

    def position(self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tells q and the new keys where they stand, before keys enter the state."""
        if self.rotary is None:
            return q, k
        return rotate(q, query_positions, self.rotary), rotate(k, key_positions, self.rotary)

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        """[b, h, n, m], scaled; nothing is masked yet."""
        return grouped_scores(q * self.scale, k)

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """A rule on scores by index, as in FlexAttention; indices broadcast to [b, h, n, m]."""
        return score

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor | None:
        """An index rule that says which keys j a query i of head h may attend to, besides causality and masks."""
        return None

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor | None:
        """Boolean, broadcasting to [b, h, n, m]: what may be attended to in all; None where that is everything."""
        allowed = where.allowed()
        b, h, i, j = self._indices(where)
        rule = self.mask_mod(b, h, i, j)
        if self.shell.window is not None and where.causal:
            near = i - j < self.shell.window
            rule = near if rule is None else rule & near
        return rule if allowed is None else (allowed if rule is None else allowed & rule)

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        """Weights [b, h, n, m]; a row with nothing allowed is zero."""
        return masked_softmax(scores, allowed)

    def mix(self, weights: Tensor, v: Tensor, where: Where) -> Tensor:
        """[b, h, n, d]."""
        return grouped_mix(weights, v)

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        """mixed [b, h, n, d] -> [b, n, e] and auxiliary losses by name."""
        joined = mixed.transpose(1, 2).flatten(-2)
        return self.o_proj(self.out_norm(joined) if self.shell.out_norm else joined), {}

    # -- the pass --------------------------------------------------------------------------------------------------

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.state is not None and call.state.keeper is not None:
            return self._beside_keeper(x, call, call.state)
        q, k, v, where = self._read(x, context, call)
        if self.listener is not None and self._waits(call):

            def later() -> Tensor:
                return self._mixed(q, k, v, where, context is not None, call)[0]

            output, losses = self.output(self.listener(Inner(q, k, v, later, None, where)), x, call)
            return Result(output, None, losses)
        mixed, weights = self._mixed(q, k, v, where, context is not None, call)
        if self.listener is not None:
            mixed = self.listener(Inner(q, k, v, mixed, weights, where))
        output, losses = self.output(mixed, x, call)
        return Result(output, weights if call.need_weights else None, losses)

    def _waits(self, call: Call) -> bool:
        """Whether head outputs may be made when the listener asks for them: what a state holds is written over, graphs
        and other processes have their order, weights are told with the pass, and a mix of its own says the shape."""
        return not (
            call.need_weights
            or self.eager
            or self.shell.softcap
            or torch.is_grad_enabled()
            or call.state is not None
            or call.across is not None
            or type(self).mix is not SoftmaxAttention.mix
        )

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where, cross: bool, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """Head outputs, and the weights where the pass makes any."""
        weights = None
        mixed: Tensor | None
        if call.across is not None:
            mixed = self._spread_out(q, k, v, call.across)
        else:
            mixed = None if call.need_weights or self.shell.softcap else self._fused(q, k, v, where)
        if mixed is None:
            weights = self.weigh(q, k, where)
            mixed = self.mix(weights, v, where)
        if cross:
            # PyTorch's kernel takes a query of NaN for one with nothing to attend to, and gives zeros: do not hide it.
            mixed = mixed + (q * 0).sum(-1, keepdim=True)
        return mixed, weights

    def _beside_keeper(self, x: Tensor, call: Call, state: State) -> Result:
        """A pass over keys and values that the state's keeper keeps, and attends to."""
        if call.need_weights or self.listener is not None:
            raise ValueError(
                f"{self.card.name}: weights and taps are of a pass that holds all keys, and a shrunk cache keeps some; "
                "ask outside the policy's block"
            )
        n, positions = x.shape[1], call.positions
        if positions is None:
            positions = torch.arange(call.seen, call.seen + n, device=x.device)[None]
        q, k, v = self.projected(x, x, call)
        q, k = self.position(q, k, positions, positions)
        mixed = state.keeper(q, k, v, call.padding, call.dense)
        state.advance(n)
        output, losses = self.output(mixed, x, call)
        return Result(output, None, losses)

    def weigh(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        """score .. normalise: weights [b, h, n, m]."""
        scores = self.score(q, k, where)
        if self.shell.softcap:
            scores = torch.tanh(scores / self.shell.softcap) * self.shell.softcap
        if type(self).score_mod is not SoftmaxAttention.score_mod:
            scores = self.score_mod(scores, *self._indices(where))
        return self.normalise(scores, self.select(q, k, where))

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        """score .. mix without the matrix, or None where only the stages can say. A mechanism with a faster way of its
        own overrides it; the conformance suite holds it equal to the stages."""
        if self.eager:
            return None
        if (
            not self.ruled
            and (self.shell.window is None or not where.causal or within(where.j.shape[0], self.shell.window))
            and where.padding is None
            and where.dense is None
            and (where.square or not where.causal or q.shape[2] == 1)
        ):
            return attend_grouped(q, k, v, scale=self.scale, causal=where.square and q.shape[2] > 1)

        def allowed(rows: slice) -> Tensor | None:
            return self.select(q[:, :, rows], k, where.rows(rows))

        return attend_rows(q, k, v, allowed, scale=self.scale, causal=where.causal)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        """`fused` within the window of the shell, of which a faster way of a mechanism's own does not know."""
        window = self.shell.window
        if window is None or not where.causal or within(where.j.shape[0], window):
            return self.fused(q, k, v, where)
        if where.dense is None and not within(q.shape[2], window) and not (self.eager or changed_stages(type(self))):
            return banded_attention(q, k, v, [window] * self.heads, scale=self.scale, padding=where.padding)
        return SoftmaxAttention.fused(self, q, k, v, where)

    def _spread_out(self, q: Tensor, k: Tensor, v: Tensor, across: Across) -> Tensor:
        if self.shell.softcap:
            raise ValueError(
                f"{self.card.name}: a sequence over several processes, and softcap={self.shell.softcap}, which no "
                "scheme has; run it in one process"
            )
        windows = self.head_windows if self.shell.window is None else [self.shell.window] * self.heads
        return across.attend(q, k, v, scale=self.scale, windows=windows)

    def _read(self, x: Tensor, context: Any, call: Call) -> tuple[Tensor, Tensor, Tensor, Where]:
        """Projects, positions, and joins what the state holds."""
        n, state = x.shape[1], call.state
        i = torch.arange(call.seen, call.seen + n, device=x.device)
        positions = i[None] if call.positions is None else call.positions
        if context is not None:
            return self._read_context(x, context, call, positions, i)
        q, k, v = self.projected(x, x, call)
        q, k = self.position(q, k, positions, positions)
        if state is None:
            counted = call.positions is None
            return q, k, v, Where(i, i, positions, positions, call.padding, call.dense, self.causal, counted)
        usual = torch.arange(call.seen + n, device=x.device)[None]
        padding = state.append_optional("padding", call.padding, torch.ones_like(usual, dtype=torch.bool))
        held_positions = state.append_optional("positions", call.positions, usual)
        k, v = state.append("keys", k), state.append("values", v)
        j = usual[0, call.seen + n - k.shape[2] :]
        dense = None if call.dense is None else call.dense[..., -len(j) :]
        state.advance(n, self.span)
        counted = held_positions is None
        key_positions = j[None] if held_positions is None else held_positions
        where = Where(i, j, positions, key_positions, padding, dense, self.causal, counted)
        return q, k, v, where

    def _read_context(
        self, x: Tensor, context: Tensor, call: Call, positions: Tensor, i: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Where]:
        j = torch.arange(context.shape[1], device=x.device)
        state: State | None = call.state
        fresh = state is None or "keys" not in state.context
        q, k, v = self.project(x, context if fresh else context[:, :0])
        if fresh:
            q, k = self.position(q, k, positions, j[None])
        else:
            q, _ = self.position(q, k, positions, j[None, :0])
        if state is not None:
            if fresh:
                state.context.update(keys=k, values=v)
            k, v = state.context["keys"], state.context["values"]
            if k.shape[2] != len(j):
                raise ValueError(
                    f"{self.card.name}: the state was made for a context of {k.shape[2]} tokens, this one has "
                    f"{len(j)}; start a new state for a new context"
                )
            state.advance(x.shape[1])
        return q, k, v, Where(i, j, positions, j[None], call.padding, call.dense)

    def _indices(self, where: Where) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = where.i.device
        batch = torch.arange(where.key_positions.shape[0], device=device)[:, None, None, None]
        heads = torch.arange(self.heads, device=device)[:, None, None]
        return batch, heads, where.i[:, None], where.j


def changed_stages(cls: type[Mechanism]) -> list[str]:
    """The stages, and index rules, in which a mechanism differs from the shell; ['attend'] for its own forward."""
    if not issubclass(cls, SoftmaxAttention) or cls.attend is not SoftmaxAttention.attend:
        return ["attend"]
    changed = [s for s in (*STAGES, "score_mod", "mask_mod") if getattr(cls, s) is not getattr(SoftmaxAttention, s)]
    by_name = cls.projected is not SoftmaxAttention.projected and "project" not in changed
    return ["project", *changed] if by_name else changed
