"""Soft and hard visual attention: additive scores over the places of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.additive import additive_scores
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.linear import widen
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

TITLE = "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention"


class AdditiveScore(nn.Module):
    """e_hij = u_h . tanh(W_a a_j + W_q x_i + b)_h with dim / heads hidden features per head. A constant beside it, as
    in the paper, is left out: softmax ignores it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_proj = nn.Linear(dim, dim)
        self.place_proj = nn.Linear(dim, dim, bias=False)
        self.direction = nn.Parameter(torch.randn(heads, dim // heads) * (dim // heads) ** -0.5)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x [b, n, e], places [b, m, e] (projected) -> [b, h, n, m]."""
        q, a = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query_proj(x), places))
        return additive_scores(q, a, self.direction)


class Gaze(nn.Module):
    """What soft and hard attention share: probabilities of places, the selector, and the state."""

    def __init__(self, dim: int, heads: int, *, selector: bool) -> None:
        super().__init__()
        self.score = AdditiveScore(dim, heads)
        self.selector = nn.Linear(dim, 1) if selector else None

    def probabilities(self, x: Tensor, context: Tensor, call: Call, temperature: float = 1.0) -> Tensor:
        allowed = call.dense
        if call.padding is not None:
            real = call.padding[:, None, None, :]
            allowed = real if allowed is None else allowed & real
        return masked_softmax(temperature * self.score(x, self._places(context, call)), allowed)

    def read(self, x: Tensor, context: Tensor, weights: Tensor, call: Call) -> Tensor:
        """Head h reads its own features of the places: [b, n, e]."""
        if call.padding is not None:
            context = context.masked_fill(~call.padding[..., None], 0.0)
        values = context.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
        mixed = (weights @ values).transpose(1, 2).flatten(-2)
        return mixed if self.selector is None else self.selector(x).sigmoid() * mixed

    def _places(self, context: Tensor, call: Call) -> Tensor:
        if call.state is None:
            return self.score.place_proj(context)
        held = call.state.context
        if "places" not in held:
            held["places"] = self.score.place_proj(context)
        if held["places"].shape[1] != context.shape[1]:
            raise ValueError(
                f"{call.state.owner}: the state was made for a context of {held['places'].shape[1]} tokens, this one "
                f"has {context.shape[1]}; start a new state for a new context"
            )
        return held["places"]


def unbalance(weights: Tensor, padding: Tensor | None) -> Tensor:
    """sum over places j of (1 - sum over queries i of w_ij)^2, mean over batch and heads: 0 where every place is looked
    at as much as every other, once in all. weights [b, h, n, m], padding [b, m]."""
    gap = (1 - widen(weights).sum(2)).square()
    if padding is not None:
        gap = gap.masked_fill(~padding[:, None], 0.0)
    return gap.sum(-1).mean()


@register
class SoftVisual(Mechanism):
    """A caption's next word looks at the places of an image by an additive score, and decides how much it looks at all.

        w_i = softmax over j of u . tanh(W_a a_j + W_q x_i + b);  z_i = sigmoid(w_s . x_i + b_s) sum_j w_ij a_j

    x: states of the decoder; context a: places. The result is z itself, with neither value nor output projection. The
    paper has one head; with more, each has its part of the hidden features and reads its part of a. selector: the gate.
    Loss `doubly-stochastic`: sum_j (1 - sum_i w_ij)^2, all queries counted; not with a state, which has seen only some.
    Weights are those before the selector.
    Source: Xu et al., arXiv:1502.03044. There x_i is the hidden state before word i, so that causality is the caller's.
    """

    card = Card(
        name="soft-visual",
        title=f"{TITLE} (soft)",
        reference="arXiv:1502.03044",
        family=Family.SCORING,
        patterns={"noncausal-cross", "causal-cross"},
        time="n m",
        state="1",
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False, selector: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        self.gaze = Gaze(dim, heads, selector=selector)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        weights = self.gaze.probabilities(x, context, call)
        output = self.gaze.read(x, context, weights, call)
        if call.state is not None:
            call.state.advance(x.shape[1])
            return Result(output, weights if call.need_weights else None)
        losses = {"doubly-stochastic": unbalance(weights, call.padding)}
        return Result(output, weights if call.need_weights else None, losses)


@register
class HardVisual(Mechanism):
    """As soft visual attention, but a word looks at one place, drawn at random; learned by REINFORCE.

        w_i = softmax over j of temperature u . tanh(W_a a_j + W_q x_i + b);  s_i ~ w_i, one-hot;
        z_i = sigmoid(w_s . x_i + b_s) sum_j s_ij a_j

    In training a whole pass is soft instead with probability `soft_share`, as in the released code (which multiplies by
    the temperature); in evaluation the likeliest place is taken, so that the result is not random. Weights returned: s.
    No gradient reaches the scores through s: with the result of a pass, `log_probability(x, context, result.weights)`
    gives sum_j s_ij log w_ij [b, n], and the loss is -(reward - baseline) times it; `Baseline` averages rewards.
    Loss `negative-entropy`: mean over queries and heads of sum_j w_ij log w_ij, which keeps the choice open.
    Source: Xu et al., arXiv:1502.03044.
    """

    card = Card(
        name="hard-visual",
        title=f"{TITLE} (hard)",
        reference="arXiv:1502.03044",
        family=Family.SCORING,
        patterns={"noncausal-cross", "causal-cross"},
        time="n m",
        state="1",
        example={"temperature": 2.0},
        notes="scores learn from rewards, not from the gradient of the output",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        selector: bool = True,
        temperature: float = 1.0,
        soft_share: float = 0.5,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self._split_heads()
        if not temperature > 0 or not 0 <= soft_share <= 1:
            raise ValueError(
                f"hard-visual: temperature={temperature}, soft_share={soft_share}; want a positive number, and a "
                "probability"
            )
        self.temperature, self.soft_share = temperature, soft_share
        self.gaze = Gaze(dim, heads, selector=selector)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        probabilities = self.gaze.probabilities(x, context, call, self.temperature)
        chosen = self._choose(probabilities)
        output = self.gaze.read(x, context, chosen, call)
        if call.state is not None:
            call.state.advance(x.shape[1])
        loss = (probabilities * _log(probabilities)).sum(-1).mean()
        return Result(output, chosen if call.need_weights else None, {"negative-entropy": loss})

    def log_probability(self, x: Tensor, context: Tensor, weights: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Of the places that a pass took, [b, n], summed over heads. mask: key padding of that pass."""
        pattern = self._check_inputs(x, context)
        padding, dense = self._check_mask(pattern, x, context, mask, None)
        probabilities = self.gaze.probabilities(x, context, Call(pattern, padding, dense), self.temperature)
        return (weights.detach() * _log(probabilities)).sum((1, 3))

    def _choose(self, probabilities: Tensor) -> Tensor:
        total = probabilities.detach().sum(-1, keepdim=True)
        if not self.training:
            index = probabilities.argmax(-1, keepdim=True)
        elif torch.rand(()).item() < self.soft_share:
            return probabilities
        else:
            pairs = torch.where(total > 0, probabilities.detach(), 1.0).flatten(0, -2)
            index = torch.multinomial(pairs.float(), 1).view(*probabilities.shape[:-1], 1)
        # A row with nothing to look at sums to zero and stays zero; one of NaN stays NaN.
        taken = torch.where(total > 0, torch.ones_like(total), total)
        return torch.zeros_like(probabilities).scatter(-1, index, taken)


class Baseline:
    """The moving average of rewards that REINFORCE subtracts: b = 0.9 b + 0.1 mean reward."""

    def __init__(self, keep: float = 0.9) -> None:
        self.keep, self.value = keep, 0.0

    def __call__(self, rewards: Tensor) -> Tensor:
        """rewards -> rewards less the baseline, which then takes their mean in; detached."""
        advantage = rewards.detach() - self.value
        self.value = self.keep * self.value + (1 - self.keep) * float(rewards.detach().mean())
        return advantage


def _log(probabilities: Tensor) -> Tensor:
    """Zero where the probability is: such places are never taken, and their gradient is not to be infinite."""
    return torch.where(probabilities > 0, probabilities, torch.ones_like(probabilities)).log()
