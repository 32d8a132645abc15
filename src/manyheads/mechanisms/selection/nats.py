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

GLOBAL, LOCAL, SLIDING = range(3)
# What the released code adds to the score of "global" outside of training.
FAVOUR = 0.1


class _Keys(NamedTuple):
    """Per key/value head and key: the kind [b, g, m, 3], one-hot, and the last query that sees it if it is local
    [b, g, m]."""

    kind: Tensor
    until: Tensor


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
    Nothing is dropped from the state: heads drop different tokens, and their rows are one tensor.
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
        notes="It saves cache only where a kernel drops what no query can see any more; here that is masked.",
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

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        logits = self.kind_proj(x.detach()).unflatten(-1, (self.kv_heads, 3)).transpose(1, 2)
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        kind, losses = self._draw(logits), self._sparsity(logits, call.padding)
        if call.state is not None:
            kind = call.state.append("kinds", kind)
        q, k, v, where = self._read(x, context, call)
        keys, weights = self._kept(kind, where), None
        if self.training:
            parts = [
                self._soft(q[:, :, rows], k, where.rows(rows), keys)
                for rows in (slice(start, start + MASK_ROWS) for start in range(0, q.shape[2], MASK_ROWS))
            ]
            weights = torch.cat(parts, 2).to(v.dtype)
            mixed = grouped_mix(weights, v)
        elif call.need_weights:
            weights = self.normalise(self.score(q, k, where), self._visible(where, keys))
            mixed = grouped_mix(weights, v)
        else:
            mixed = attend_rows(
                q, k, v, lambda rows: self._visible(where.rows(rows), keys), scale=self.scale, causal=True
            )
        output, _ = self.output(self.offered(q, k, v, mixed, weights, where), x, call)
        return Result(output, weights if call.need_weights else None, losses)

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

    def _kept(self, kind: Tensor, where: Where) -> _Keys:
        m = kind.shape[2]
        real = torch.ones_like(kind[:, 0, :, 0], dtype=torch.bool) if where.padding is None else where.padding
        first = (real & (real.cumsum(1) == 1))[:, None, :, None]
        always = F.one_hot(torch.tensor(GLOBAL, device=kind.device), 3).to(kind.dtype)
        kind = torch.where(first, always, kind)
        place = torch.arange(m, device=kind.device)
        stops = (kind[..., GLOBAL] > 0.5) & real[:, None]
        # The nearest global token behind each one: a running minimum from the right, one step further.
        ends = torch.where(stops, place, m).flip(-1).cummin(-1).values.flip(-1)
        return _Keys(kind, F.pad(ends[..., 1:], (0, 1), value=m))

    def _rules(self, where: Where, keys: _Keys) -> tuple[Tensor, Tensor]:
        """Whether i would see j if it were local, or sliding: [b, g, n, m] and [n, m]."""
        i = where.i[:, None]
        return i <= keys.until[:, :, None], i - where.j < self.window

    def _visible(self, where: Where, keys: _Keys) -> Tensor:
        local, sliding = self._rules(where, keys)
        kind = keys.kind[:, :, None] > 0.5
        seen = kind[..., GLOBAL] | (kind[..., LOCAL] & local) | (kind[..., SLIDING] & sliding)
        seen = seen.repeat_interleave(self.heads // self.kv_heads, 1)
        allowed = where.allowed()
        return seen if allowed is None else seen & allowed

    def _soft(self, q: Tensor, k: Tensor, where: Where, keys: _Keys) -> Tensor:
        """The weights under a mask that is 0 or 1 but has the gradient of the kinds' probabilities."""
        local, sliding = self._rules(where, keys)
        kind = keys.kind[:, :, None]
        mask = kind[..., GLOBAL] + kind[..., LOCAL] * local + kind[..., SLIDING] * sliding
        mask = mask.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = grouped_scores(q * self.scale, k).to(mask.dtype)
        allowed = where.allowed()
        if allowed is not None:
            scores, mask = scores.masked_fill(~allowed, -torch.inf), mask.masked_fill(~allowed, 0.0)
        # The largest score among what is visible: what is not may overflow, and is cut off.
        seen = scores.detach().masked_fill(mask.detach() < 0.5, -torch.inf)
        most = seen.amax(-1, keepdim=True)
        raised = (scores - most.masked_fill(most == -torch.inf, 0.0)).clamp(max=30.0).exp() * mask
        total = raised.sum(-1, keepdim=True)
        return raised / total.masked_fill(total == 0, 1.0)
