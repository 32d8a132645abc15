"""Neural attention search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import MASK_ROWS, attend_rows, grouped_mix, grouped_scores
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call, Result
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention, Where
from manyheads.state import State

GLOBAL, LOCAL, SLIDING = range(3)
# What the released code adds to the score of "global" outside of training.
FAVOUR = 0.1
BEYOND = 1 << 30
# What of the keys a state holds, and under which name.
_NAMES = {"kind": "kinds", "place": "places", "stand": "stands", "hidden": "hidden", "real": "real"}


class _Keys(NamedTuple):
    """Per key/value head and key (or [1, 1, m] where it is the same for all): the kind [b, g, m, 3], one-hot; the last
    query that sees it if it is local; its place in the sequence; where it stands for a window, as `_Dropping` has it;
    how many hidden tokens came behind it; whether it is a token that may be seen at all."""

    kind: Tensor
    until: Tensor
    place: Tensor
    stand: Tensor
    hidden: Tensor
    real: Tensor


class _Dropping(State):
    """Told which of the tokens seen are real, and it is those that were: windows count real tokens from then on, as if
    hidden ones had been padding on the left."""

    def tell(self, real: Tensor) -> None:
        super().tell(real)
        if "places" in self.fixed:
            self.fixed["stands"] = self.fixed["places"] + self.fixed["hidden"]


@register
class NAtS(SoftmaxAttention):
    """Each token says, per key/value head, how long it is kept: always, until the next global token, or for a window.

        kind_j = argmax of W x_j;  i sees j <= i if kind_j is global, or local and no global token lies in (j, i), or
        sliding and i - j < window;  softmax over those of q_i . k_j / sqrt(d), times v_j

    The first real token is global. In training the kind is drawn (Gumbel, temperature 1), and its probabilities get a
    gradient as if the mask were soft: M exp(score) / sum(M exp(score)), with M the drawn mask forward. Loss `sparsity`:
    mean probability of global over real tokens and heads, plus half that of local, for the caller to weigh.

    Source: arXiv:2502.13251 and its released code. There x is detached before W, as here; the last token of a training
    sequence is global as well, which changes no output, and its penalty works inside its kernel: this loss is ours.
    The state drops, after every pass, what no later query can see: padding, sliding tokens behind the window, local
    ones behind a global one. Heads and rows of a batch drop different tokens, and are held as one tensor as wide as the
    fullest of them; earlier tokens cannot be hidden or shown afterwards.
    """

    card = Card(
        name="nats",
        title="Neural Attention Search",
        reference="arXiv:2502.13251",
        family=Family.SELECTION,
        patterns={"causal-self"},
        time="n^2",
        state="n",
        example={"window": 2, "kv_heads": 2},
        notes="How much of the cache is saved depends on the kinds that were learnt: global tokens stay for good, and "
        "the state is as wide as the head that keeps most. Random weights make about a third of them global.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 64,
        kv_heads: int | None = None,
        causal: bool = True,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, kv_heads=kv_heads, bias=bias, rotary=rotary)
        if window < 1:
            raise ValueError(f"{self.card.name}: window={window} must be positive; a token sees itself at least")
        self.window = window
        self.kind_proj = nn.Linear(dim, self.kv_heads * 3, bias=False)

    def init_state(self, batch: int, *, capacity: int = 0) -> State:
        usual = super().init_state(batch, capacity=capacity)
        return _Dropping(usual.owner, batch, config=usual.config)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        logits = self.kind_proj(x.detach()).unflatten(-1, (self.kv_heads, 3)).transpose(1, 2)
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        kind, losses = self._draw(logits), self._sparsity(logits, call.padding)
        q, k, v = self.projected(x, x, call)
        positions = call.query_positions(x)
        q, k = self.position(q, k, positions, positions)
        i = torch.arange(call.seen, call.seen + x.shape[1], device=x.device)
        keys = self._new(kind, call, i)
        if call.state is not None:
            k, v, keys = self._joined(k, v, keys, call.state)
        keys = keys._replace(until=_until(keys))
        mixed, weights = self._over_visible(q, k, v, i, keys, call)
        if call.state is not None:
            self._hold(k, v, keys, call.state, x.shape[1])
        if weights is not None and call.state is not None:
            weights = self._spread(weights, keys, call.state.length)
        # Behind dropped tokens the columns of the weights are places, which keys and values are not.
        if call.state is None:
            where = Where(i, i, positions, positions, call.padding, call.dense, self.causal, call.positions is None)
            mixed = self.offered(q, k, v, mixed, weights, where)
        output, _ = self.output(mixed, x, call)
        return Result(output, weights if call.need_weights else None, losses)

    def _over_visible(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, keys: _Keys, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        def allowed(rows: slice) -> Tensor:
            return self._allowed(i[rows], keys, None if call.dense is None else call.dense[:, :, rows])

        if self.training:
            slices = [slice(start, start + MASK_ROWS) for start in range(0, q.shape[2], MASK_ROWS)]
            parts = [self._soft(q[:, :, rows], k, i[rows], keys, allowed(rows)) for rows in slices]
            weights = torch.cat(parts, 2).to(v.dtype)
            return grouped_mix(weights, v), weights
        if call.need_weights:
            scores = grouped_scores(q * self.scale, k)
            weights = self.normalise(scores, self._visible(i, keys) & allowed(slice(None)))
            return grouped_mix(weights, v), weights

        def seen(rows: slice) -> Tensor:
            return self._visible(i[rows], keys) & allowed(rows)

        return attend_rows(q, k, v, seen, scale=self.scale, causal=True), None

    # -- what is held ----------------------------------------------------------------------------------------------

    def _new(self, kind: Tensor, call: Call, i: Tensor) -> _Keys:
        """Of this pass's tokens. The first real one of all passes is global."""
        b, _, n, _ = kind.shape
        real = torch.ones(b, n, dtype=torch.bool, device=i.device) if call.padding is None else call.padding
        first = real & (real.cumsum(1) == 1)
        if call.state is not None:
            begun = call.state.fixed.get("begun", torch.zeros_like(real[:, 0]))
            first, call.state.fixed["begun"] = first & ~begun[:, None], begun | real.any(1)
        always = F.one_hot(torch.tensor(GLOBAL, device=i.device), 3).to(kind.dtype)
        kind = torch.where(first[:, None, :, None], always, kind)
        place, behind = i[None, None], (~real).flip(1).cumsum(1).flip(1) - (~real).long()
        return _Keys(kind, place, place, place, behind[:, None], real[:, None])

    def _joined(self, k: Tensor, v: Tensor, keys: _Keys, state: State) -> tuple[Tensor, Tensor, _Keys]:
        """Those held, and the new ones behind them."""
        own = {name: getattr(keys, name) for name in _NAMES}
        own |= {name: rows.expand(*k.shape[:2], -1) for name, rows in own.items() if rows.ndim == 3}
        if "keys" in state.fixed:
            held = dict(state.fixed)
            held["hidden"] = held["hidden"] + (~keys.real).sum(-1, keepdim=True)
            own = {name: torch.cat([held[_NAMES[name]], rows], 2) for name, rows in own.items()}
            k, v = torch.cat([held["keys"], k], 2), torch.cat([held["values"], v], 2)
        return k, v, keys._replace(**own)

    def _hold(self, k: Tensor, v: Tensor, keys: _Keys, state: State, tokens: int) -> None:
        """What the next query can still see, the oldest first, per head behind it whatever fills up its rows."""
        state.advance(tokens)
        after, kind = state.length, keys.kind.detach() > 0.5
        # A window may yet be told to count real tokens only.
        local, near = keys.until >= after, after - keys.place - keys.hidden < self.window
        needed = keys.real & (kind[..., GLOBAL] | (kind[..., LOCAL] & local) | (kind[..., SLIDING] & near))
        most = int(needed.sum(-1).max())
        order = needed.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]

        def chosen(rows: Tensor) -> Tensor:
            return rows.gather(2, order if rows.ndim == 3 else order[..., None].expand(*order.shape, rows.shape[3]))

        kept = keys._replace(real=needed)
        state.fixed |= {"keys": chosen(k), "values": chosen(v)}
        state.fixed |= {held: chosen(getattr(kept, name)) for name, held in _NAMES.items()}

    def _spread(self, weights: Tensor, keys: _Keys, length: int) -> Tensor:
        """weights [b, h, n, held] -> [b, h, n, length]: the columns at the tokens' places, zero for dropped ones."""
        place = keys.place.repeat_interleave(self.heads // self.kv_heads, 1)[:, :, None].expand_as(weights)
        return weights.new_zeros(*weights.shape[:3], length).scatter_add(3, place, weights)

    # -- kinds -----------------------------------------------------------------------------------------------------

    def _draw(self, logits: Tensor) -> Tensor:
        """One-hot [b, g, n, 3]."""
        if self.training:
            return F.gumbel_softmax(logits, tau=1.0, hard=True)
        favoured = logits + FAVOUR * F.one_hot(torch.tensor(GLOBAL, device=logits.device), 3)
        return F.one_hot(favoured.argmax(-1), 3).to(logits.dtype)

    def _sparsity(self, logits: Tensor, padding: Tensor | None) -> Mapping[str, Tensor]:
        probs = logits.softmax(-1)
        kept = probs[..., GLOBAL] + 0.5 * probs[..., LOCAL]
        if padding is None:
            return {"sparsity": kept.mean()}
        kept = kept.masked_fill(~padding[:, None], 0.0)
        return {"sparsity": kept.sum() / (padding.sum().clamp(min=1) * self.kv_heads)}

    def _rules(self, i: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
        """Whether i [n] would see j if it were local, or sliding: [b or 1, g or 1, n, m]."""
        return i[:, None] <= keys.until[:, :, None], i[:, None] - keys.stand[:, :, None] < self.window

    def _visible(self, i: Tensor, keys: _Keys) -> Tensor:
        local, sliding = self._rules(i, keys)
        kind = keys.kind[:, :, None] > 0.5
        seen = kind[..., GLOBAL] | (kind[..., LOCAL] & local) | (kind[..., SLIDING] & sliding)
        return seen.repeat_interleave(self.heads // self.kv_heads, 1)

    def _allowed(self, i: Tensor, keys: _Keys, dense: Tensor | None) -> Tensor:
        """What causality, padding and a dense mask [b, h or 1, n, all tokens] leave: [b or 1, h or 1, n, m]."""
        past = (keys.place[:, :, None] <= i[:, None]) & keys.real[:, :, None]
        if past.shape[1] > 1:
            past = past.repeat_interleave(self.heads // self.kv_heads, 1)
        if dense is None:
            return past
        if keys.place.shape[:2] == (1, 1):
            return past & dense
        place = keys.place.repeat_interleave(self.heads // self.kv_heads, 1)[:, :, None].expand_as(past)
        return past & dense.expand(len(place), self.heads, -1, -1).gather(3, place)

    def _soft(self, q: Tensor, k: Tensor, i: Tensor, keys: _Keys, allowed: Tensor) -> Tensor:
        """The weights under a mask that is 0 or 1 but has the gradient of the kinds' probabilities."""
        local, sliding = self._rules(i, keys)
        kind = keys.kind[:, :, None]
        mask = kind[..., GLOBAL] + kind[..., LOCAL] * local + kind[..., SLIDING] * sliding
        mask = mask.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = grouped_scores(q * self.scale, k).to(mask.dtype)
        scores, mask = scores.masked_fill(~allowed, -torch.inf), mask.masked_fill(~allowed, 0.0)
        # The largest score among what is visible: what is not may overflow, and is cut off.
        seen = scores.detach().masked_fill(mask.detach() < 0.5, -torch.inf)
        most = seen.amax(-1, keepdim=True)
        raised = (scores - most.masked_fill(most == -torch.inf, 0.0)).clamp(max=30.0).exp() * mask
        total = raised.sum(-1, keepdim=True)
        return raised / total.masked_fill(total == 0, 1.0)


def _until(keys: _Keys) -> Tensor:
    """The place of the nearest real global token behind each key, [b, g, m]; beyond all places where there is none."""
    stops = (keys.kind[..., GLOBAL] > 0.5) & keys.real
    # A running minimum from the right, one step further.
    ends = torch.where(stops, keys.place, BEYOND).flip(-1).cummin(-1).values.flip(-1)
    return F.pad(ends[..., 1:], (0, 1), value=BEYOND)
