"""Linear log-normal attention, with and without its block-diagonal half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.kernelised import in_stretches, joined, read_self, real_tokens, shown
from manyheads.functional.linear import CHUNK, Kernel, allowed_pairs, checked_chunk, hide, widen
from manyheads.inner import Across
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

# log-normal fit of the variance of exp(q . k) that the paper makes at random inputs: 2 a s^2 + b = (std_q std_k)^2.
SLOPE, OFFSET = 0.14855178144710912, -0.35487039130661086
# Exponents stay within this: the range of their products still fits into float32.
LARGEST = 30.0
# How the two halves are mixed: the learned factors of each way.
MIXINGS = {"average": (), "scale": ("r", "p"), "ratio": ("r",)}
EXPONENTIAL = Kernel(query=lambda x: (x - x.amax(-1, keepdim=True)).exp(), key=torch.exp)


def moments(x: Tensor, padding: Tensor, *, causal: bool) -> Tensor:
    """x [b, h, n, d] -> count, sum and sum of squares over heads, features and real tokens, up to each one where
    causal: [b, n or 1, 3]."""
    rows = hide(x, padding).transpose(1, 2).flatten(2)
    sums = torch.stack((padding.to(rows.dtype) * rows.shape[-1], rows.sum(-1), rows.square().sum(-1)), -1)
    return sums.cumsum(1) if causal else sums.sum(1, keepdim=True)


def spread_of(sums: Tensor) -> Tensor:
    """Moments [b, n or 1, 3] -> standard deviations [b, 1, n or 1, 1]."""
    total = sums[..., 0].clamp(min=2.0)
    spread = (sums[..., 2] - sums[..., 1].square() / total) / (total - 1)
    return spread.clamp(min=1e-12).sqrt()[:, None, :, None]


@register
class LLN(Mechanism):
    """Linear attention whose weights are log-normal like softmax attention's, with the same mean and spread.

        phi(q_i) . psi(k_j) / (phi(q_i) . sum_j psi(k_j)),  phi(q) = exp(alpha q), psi(k) = exp(beta k)
        alpha = s / std(q), beta = s / std(k),  s^2 = (std(q)^2 std(k)^2 - b) / (2 a)

    no gradient through alpha and beta. diagonal: the mean of that and of softmax(q k^T / sqrt(d)) v within blocks of
    `block` positions (None: the head dim, as published). mixing: "average", or in place of the halves learned numbers
    per head and feature, "scale" (r linear + p near) or "ratio" (r linear + (1 - r) near), a half at first; then no
    matrix is shared by the features, and weights is None. Scaled queries and keys are held within +-30. State: sums of
    psi(k) [v, 1], moments, and one block.
    Source: Nahshan et al., arXiv:2311.13541. The released code takes std over the batch and the whole sequence, so that
    every output depends on other rows and on the future. Here it is over one row's real tokens, up to each where
    causal: a key's beta is from its own prefix and stays. Causal blocks are causal inside; a block is looked for among
    the nearest `block` tokens, so that positions which leave padding out may do so only before the first real token.
    """

    card = Card(
        name="lln",
        title="Linear Log-Normal Attention with Unbiased Concentration",
        reference="arXiv:2311.13541",
        family=Family.LINEAR,
        patterns={"noncausal-self", "causal-self"},
        time="n",
        state="1",
        parallel="state",
        example={"chunk": 4, "block": 4},
        notes="The causal form scales each token by the moments of its own prefix. With a state, neither dense masks "
        "nor weights reach back to earlier passes. Slower to learn lookup than softmax: 93% on quick recall, "
        "95% in five times the steps.",
    )

    r: Tensor  # of the linear half, and p of the near one, [1, h, 1, d]: where mixing is learned
    p: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        diagonal: bool = True,
        block: int | None = None,
        mixing: str = "average",
        chunk: int = CHUNK,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.head_dim = self._split_heads()
        self.block = self.head_dim if block is None else block
        if self.block < 1:
            raise ValueError(f"lln: block={block} must be at least 1 (or None for the head dim, {self.head_dim})")
        if mixing not in MIXINGS or (mixing != "average" and not diagonal):
            raise ValueError(
                f"lln: mixing={mixing!r} with diagonal={diagonal}; want one of {list(MIXINGS)}, with diagonal=False "
                "'average' alone, as there is nothing to mix"
            )
        self.mixing = mixing
        for name in MIXINGS[mixing]:
            self.register_parameter(name, nn.Parameter(torch.full((1, heads, 1, self.head_dim), 0.5)))
        self.diagonal, self.chunk = diagonal, checked_chunk(self.card.name, chunk)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        long = in_stretches(self, x, call)
        if long is not None:
            return long
        q, k, v = (widen(self._heads(project(x))) for project in (self.q_proj, self.k_proj, self.v_proj))
        scaled_q, scaled_k = self._matched(q, k, call)
        read = read_self(self.card.name, scaled_q, scaled_k, v, EXPONENTIAL, call, causal=self.causal, chunk=self.chunk)
        mixed, weights = read.mixed, read.weights
        if self.diagonal:
            near, near_weights = self._diagonal(q, k, v, call, matrix=weights is not None)
            mixed = self._mix(mixed, near)
            weights = 0.5 * (weights + near_weights) if weights is not None and self.mixing == "average" else None
        if call.state is not None:
            call.state.advance(x.shape[1])
        return Result(self.o_proj(joined(mixed, x)), shown(weights, call, x))

    def _mix(self, linear: Tensor, near: Tensor) -> Tensor:
        if self.mixing == "average":
            return 0.5 * (linear + near)
        r = self.r.to(linear.dtype)
        return r * linear + (self.p.to(linear.dtype) if self.mixing == "scale" else 1 - r) * near

    def _matched(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """q and k times alpha and beta."""
        padding = real_tokens(q[:, 0], call.padding)
        with torch.no_grad():
            q_std, k_std = (self._std(t, name, padding, call) for t, name in ((q, "q_sums"), (k, "k_sums")))
            wanted = (((q_std * k_std).square() - OFFSET) / (2 * SLOPE)).sqrt()
        q, k = ((t * (wanted / std)).clamp(-LARGEST, LARGEST) for t, std in ((q, q_std), (k, k_std)))
        return q, k

    def _std(self, x: Tensor, name: str, padding: Tensor, call: Call) -> Tensor:
        """Of all tokens that the call knows of, those of other processes and of earlier calls among them."""
        sums = moments(x, padding, causal=self.causal)
        if call.across is not None:
            other = call.across.sums(sums[:, -1], causal=self.causal)[:, None]
            sums = sums + other if self.causal else other
        elif call.state is not None:
            sums = sums + call.state.fixed[name][:, None] if name in call.state.fixed else sums
            call.state.fixed[name] = sums[:, -1].clone()
        return spread_of(sums)

    # -- the block-diagonal half -----------------------------------------------------------------------------------

    def _diagonal(self, q: Tensor, k: Tensor, v: Tensor, call: Call, *, matrix: bool) -> tuple[Tensor, Any]:
        """softmax within blocks: [b, h, n, d], and [b, h, n, n] where the matrix is wanted."""
        n, real = q.shape[2], real_tokens(q[:, 0], call.padding)
        labels = call.query_positions(q[:, 0]).expand(q.shape[0], -1) // self.block
        v = hide(v, call.padding)
        if matrix:
            allowed = allowed_pairs(q, k, causal=self.causal, padding=call.padding, dense=call.dense)
            same = (labels[:, None, :, None] == labels[:, None, None, :]) & real[:, None, None, :]
            allowed = same if allowed is None else same & allowed
            weights = masked_softmax(q @ k.mT * self.head_dim**-0.5, allowed)
            self._hold(k, v, labels, real, call)
            return weights @ v, weights
        before = self.block - 1
        after = 0 if self.causal else before
        k, v, keys = self._hold(k, v, labels, real, call)
        size = self.block + before + after
        short = -n % self.block
        pad = (0, 0, 0, short + after)
        queries = _windows(nn.functional.pad(q, (0, 0, 0, short)), self.block, self.block)
        k, v = (_windows(nn.functional.pad(t, pad), size, self.block) for t in (k, v))
        asked = nn.functional.pad(labels, (0, short), value=-2).unfold(1, self.block, self.block)
        given = nn.functional.pad(keys, (0, short + after), value=-1).unfold(1, size, self.block)
        allowed = asked[..., :, None] == given[..., None, :]
        if self.causal:
            allowed = allowed & torch.ones(self.block, size, dtype=torch.bool, device=q.device).tril(before)
        weights = masked_softmax(queries @ k.mT * self.head_dim**-0.5, allowed[:, None])
        return (weights @ v).flatten(2, 3)[:, :, :n], None

    def _hold(self, k: Tensor, v: Tensor, labels: Tensor, real: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [b, h, ., d] and block numbers [b, .] (-1: not there) with block - 1 tokens of the state in front."""
        n, before = k.shape[2], self.block - 1
        held = {} if call.state is None else call.state.fixed
        labels = labels.masked_fill(~real, -1)
        if call.across is not None:
            return self._joined(k, v, labels, call.across)
        if "keys" in held:
            k, v = torch.cat((held["keys"], k), 2), torch.cat((held["values"], v), 2)
            labels = torch.cat((held["labels"], labels), 1)
        else:
            k, v = (nn.functional.pad(t, (0, 0, before, 0)) for t in (k, v))
            labels = nn.functional.pad(labels, (before, 0), value=-1)
        if call.state is not None:
            # Copies: a view would keep the whole pass alive.
            held.update(keys=k[:, :, n:].clone(), values=v[:, :, n:].clone(), labels=labels[:, n:].clone())
        return k, v, labels

    def _joined(self, k: Tensor, v: Tensor, labels: Tensor, across: Across) -> tuple[Tensor, Tensor, Tensor]:
        """With the tokens in front that other processes hold, in one exchange."""
        if not self.causal:
            raise ValueError(
                "lln: blocks that are not causal reach into the next process's tokens, for which no scheme is here; "
                "want diagonal=False"
            )
        # Rows of no token are zeros: block numbers go one higher.
        rows = torch.cat(((labels + 1)[..., None].to(k.dtype), *(t.transpose(1, 2).flatten(2) for t in (k, v))), -1)
        earlier = across.before(rows, self.block - 1)
        before = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in earlier[..., 1:].chunk(2, -1)]
        k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        return k, v, torch.cat((earlier[..., 0].round().to(labels.dtype) - 1, labels), 1)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


def _windows(t: Tensor, size: int, step: int) -> Tensor:
    """[b, h, m, d] -> overlapping stretches [b, h, blocks, size, d]."""
    return t.unfold(2, size, step).transpose(-1, -2)
