"""Sparse Sinkhorn attention: blocks of keys are sorted next to the blocks that need them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import attend_grouped, masked_softmax
from manyheads.functional.linear import hide, widen
from manyheads.functional.past_blocks import NONE, Rule, attend_blocks, attend_pairs, pick, running_mean
from manyheads.functional.sinkhorn import transport_plan
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register
from manyheads.state import State

# In place of the number of a token's block.
LOCAL, HIDDEN = -1, -2


@register
class SparseSinkhorn(Mechanism):
    """A block of queries attends to itself and to one more block, put beside it by a soft permutation of the blocks.

        R = sinkhorn(log(relu(mean q_I . mean k_J / sqrt(d))) / temperature),  K'_I = sum_J R_IJ K_J, V' likewise
        out_i = softmax over the tokens of block I and the slots of K'_I of (q_i . k / sqrt(d)), times v

    block: tokens per block, the last one may be shorter. iterations: of rows, then columns, so that columns of R sum to
    1, and rows almost. In training Gumbel noise is added to the logarithms. Padding is not in the means, blocks without
    a token are not sorted, and a slot counts if some block has a token there. Matrix over tokens: the weights of the
    block itself, plus slot weights times R.
    Causal: block I picks `sorted_blocks` of those before it, or learned empty ones, by softmax((mean of all q up to its
    first token . sum over J of the running means of k) / (sqrt(d) temperature)), the largest first; K'_I and V'_I are
    those blocks times their shares. The later half of the heads begin their blocks at token block - 1, and attend to
    the tokens before it among themselves. It has no iterations and no noise. Blocks are cut by position.
    Source: Tay et al., Sparse Sinkhorn Attention, arXiv:2002.11296, whose sorting network maps a block's sum to places;
    this follows the form by mean queries and keys of the best-known code (sinkhorn-transformer), which any length
    allows, without its noise in evaluation and its sorted keys in place of sorted values. The causal form is its too
    (Sinkhorn's balance is not causal), but a short sequence does not lessen the number of picks.
    Weights: the code's to_kv is k_proj over v_proj; its to_out has a bias, the others none; null_keys, null_values are
    as there.
    """

    card = Card(
        name="sparse-sinkhorn",
        title="Sparse Sinkhorn Attention",
        reference="arXiv:2002.11296",
        family=Family.SCORING,
        patterns={"noncausal-self", "causal-self"},
        time="n block + (n / block)^2 block",
        state="n",
        example={"block": 4},
        notes="Balancing the columns would let later blocks change what earlier ones get: the causal form picks blocks "
        "of the past instead, as the best-known code does.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        block: int = 64,
        iterations: int = 8,
        temperature: float = 0.7,
        sorted_blocks: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        if block < 1 or iterations < 1 or not temperature > 0:
            raise ValueError(
                f"sparse-sinkhorn: block={block}, iterations={iterations}, temperature={temperature}; want all above 0"
            )
        if sorted_blocks < 1 or (sorted_blocks > 1 and not causal):
            raise ValueError(
                f"sparse-sinkhorn: sorted_blocks={sorted_blocks} with causal={causal}; want at least 1, and 1 where "
                "blocks are put in one order"
            )
        self.block, self.iterations, self.temperature = block, iterations, temperature
        self.sorted_blocks = sorted_blocks
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.null_keys = nn.Parameter(torch.randn(heads, 1, self.head_dim)) if causal else None
        self.null_values = nn.Parameter(torch.randn(heads, 1, self.head_dim)) if causal else None

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(
                "sparse-sinkhorn: a dense mask was given, but sorted keys are mixtures of tokens; give key padding "
                "[batch, n] as the mask"
            )
        if self.causal:
            return self._causal(x, call)
        n, gap = x.shape[1], -x.shape[1] % self.block
        q, k, v = (self._blocks(p(x), call.padding, gap) for p in (self.q_proj, self.k_proj, self.v_proj))
        real = None if call.padding is None and not gap else self._real(x, call.padding, gap)
        order = self._order(q, k, real).to(x.dtype)
        keys, values = (torch.cat((t, (order @ t.flatten(3)).view_as(t)), 3) for t in (k, v))
        allowed = None
        if real is not None:
            slots = real.any(1, keepdim=True) & real.any(2, keepdim=True)
            allowed = torch.cat((real, slots), 2)[:, None, :, None]
        weights = masked_softmax((q * self.scale) @ keys.mT, allowed)
        mixed = (weights @ values).flatten(2, 3)[:, :, :n]
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if not call.need_weights:
            return Result(output)
        real = self._real(x, call.padding, gap) if real is None else real
        return Result(output, self._over_tokens(weights, order, real, n))

    def _blocks(self, t: Tensor, padding: Tensor | None, gap: int) -> Tensor:
        """[b, n, e] -> [b, h, c, s, d], zero where nothing stands."""
        t = hide(t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), padding)
        t = F.pad(t, (0, 0, 0, gap)) if gap else t
        return t.unflatten(2, (-1, self.block)).contiguous()

    def _real(self, x: Tensor, padding: Tensor | None, gap: int) -> Tensor:
        """Where a token stands, [b, c, s]."""
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if padding is None else padding
        return F.pad(real, (0, gap)).unflatten(1, (-1, self.block))

    def _order(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        """[b, h, c, c]: how much of block J comes to stand beside block I."""
        count = self.block if real is None else real.sum(2).clamp(min=1).to(q.dtype)[:, None, :, None]
        affinity = ((q.sum(3) / count) @ (k.sum(3) / count).mT * self.scale).relu()
        logits = (widen(affinity) + 1e-6).log()
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        some = None if real is None else real.any(2)
        pairs = None if some is None else (some[:, :, None] & some[:, None])[:, None]
        # Rows first, columns last, which is the plan of the transpose.
        pairs = None if pairs is None else pairs.mT
        return transport_plan(logits.mT / self.temperature, pairs, self.iterations).mT

    def _over_tokens(self, weights: Tensor, order: Tensor, real: Tensor, n: int) -> Tensor:
        b, h, c, s, _ = weights.shape
        own, sorted_in = weights.split(s, -1)
        full = torch.einsum("bhiqs,bhij->bhiqjs", sorted_in, order)
        at = torch.arange(c, device=weights.device)
        full[:, :, at, :, at] = full[:, :, at, :, at] + own.permute(2, 0, 1, 3, 4)
        full = full.masked_fill(~real[:, None, None, None], 0.0)
        return full.reshape(b, h, c * s, c * s)[:, :, :n, :n]

    # -- causal ----------------------------------------------------------------------------------------------------

    def _causal(self, x: Tensor, call: Call) -> Result:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        assert self.null_keys is not None
        assert self.null_values is not None
        rule = Rule(self.sorted_blocks, self.temperature, self.null_keys, self.null_values, self.block, self.scale)
        plain = call.padding is None and call.positions is None and call.seen == 0 and not call.need_weights
        mixed, weights = self._in_blocks(q, k, v, rule) if plain else None, None
        if mixed is None or call.state is not None:
            firsts, of_query = self._firsts(q, call)
            k, v, of_key = _held(k, v, of_query, call.state)
            if mixed is None:
                mixed, weights = self._in_pairs(q, k, v, firsts, of_query, of_key, rule)
        if call.state is not None:
            call.state.advance(x.shape[1])
        output = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return Result(output, weights if call.need_weights else None)

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """Tokens 0 .. n of a first pass without padding, and no matrix of them."""
        half, late = self.heads // 2, self.block - 1
        parts = []
        for heads, start in ((slice(half), 0), (slice(half, None), late)):
            own = rule._replace(empty_key=rule.empty_key[heads], empty_value=rule.empty_value[heads])
            queries, keys, values = (t[:, heads] for t in (q, k, v))
            part = attend_blocks(queries[:, :, start:], keys[:, :, start:], values[:, :, start:], own)
            if start:
                before = (t[:, :, :start] for t in (queries, keys, values))
                part = torch.cat((attend_grouped(*before, scale=self.scale, causal=True), part), 2)
            parts.append(part)
        return torch.cat(parts, 1)

    def _firsts(self, q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """For every query of the pass the mean of queries at the first token of its block [b, h, n, d], and its block
        [b, h, n]: 0, 1 .. as they come, LOCAL before the first of the later heads, HIDDEN for padding."""
        (b, h, n, _), q = q.shape, widen(q)
        held: dict[str, Tensor] = {} if call.state is None else call.state.fixed
        if not held:
            nothing, none = torch.zeros_like(q[:, :, 0]), torch.full((b, h), -1, device=q.device)
            held.update(sums=nothing, first=nothing, counts=none + 1, label=none, block=none)
        late = torch.arange(h, device=q.device) >= h // 2
        label = (call.query_positions(q[:, 0]).expand(b, n)[:, None] - late[:, None] * (self.block - 1)) // self.block
        real = torch.ones_like(label, dtype=torch.bool) if call.padding is None else call.padding[:, None]
        counted = real & (label >= 0)
        sums = held["sums"][:, :, None] + (q * counted[..., None]).cumsum(2)
        counts = held["counts"][..., None] + counted.cumsum(2)
        means = sums / counts.clamp(min=1)[..., None]
        latest = _latest(counted)
        labels = torch.cat((held["label"][..., None], label), 2).gather(2, F.pad(latest, (1, 0), value=-1) + 1)
        begins = counted & (label != labels[..., :-1])
        block = held["block"][..., None] + begins.cumsum(2)
        rows = torch.cat((held["first"][:, :, None], means), 2)
        firsts = rows.gather(2, (_latest(begins) + 1)[..., None].expand_as(q))
        last = {"sums": sums, "first": firsts, "counts": counts, "label": labels[..., 1:], "block": block}
        held.update({name: t[:, :, -1].clone() for name, t in last.items()})
        return firsts, torch.where(counted, block, torch.where(real, LOCAL, HIDDEN))

    def _in_pairs(
        self, q: Tensor, k: Tensor, v: Tensor, firsts: Tensor, of_query: Tensor, of_key: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        """The same for what the blocks cannot tell: padding, positions, a state, weights."""
        n, m, blocks = q.shape[2], k.shape[2], int(of_key.max()) + 1
        means = running_mean(widen(k), of_key >= 0)
        index = torch.where(of_key >= 0, of_key, max(blocks, 0))[..., None].expand_as(means)
        sums = means.new_zeros(*k.shape[:2], max(blocks, 0) + 1, k.shape[3]).scatter_add(2, index, means)[:, :, :-1]
        past = torch.arange(sums.shape[2], device=q.device) < of_query[..., None]
        picks = pick(firsts, sums, past, rule)
        picks = picks._replace(block=picks.block.masked_fill((of_query < 0)[..., None], NONE))
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        own = (of_query[..., None] == of_key[:, :, None]) & seen & (of_query != HIDDEN)[..., None]
        return attend_pairs(q, k, v, own, of_key, picks, rule)


def _latest(true: Tensor) -> Tensor:
    """[.., n] -> the place of the last True up to each one, -1 where there is none."""
    place = torch.arange(true.shape[-1], device=true.device)
    return torch.where(true, place, -1).cummax(-1).values


def _held(k: Tensor, v: Tensor, blocks: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and their blocks [b, h, m], those of earlier passes before them."""
    if state is None:
        return k, v, blocks
    kept = state.append("blocks", blocks[..., None].int()).squeeze(-1).long()
    return state.append("keys", k), state.append("values", v), kept
