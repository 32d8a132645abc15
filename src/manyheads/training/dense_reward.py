"""Attention based credit: one reward at the end of a text, spread over its tokens by the reward model's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import AttentionCall


def attention_reward(call: Any, reward: Tensor, response: Tensor, *, beta: float = 1.0) -> Tensor:
    """A dense reward [b, n] whose sum over an example is its `reward` [b]; 0 outside of the response.

        r_t = beta reward a_t + (1 - beta) reward [t is the last token of the response]
        a_t = weight of the last response token's query on token t, mean over heads, shares of the response's tokens

        with record(reward_model, layers=[last]) as calls, torch.no_grad():
            reward = reward_model(**batch).logits[:, 0]
        dense = attention_reward(calls[0], reward, response)   # less the caller's KL term, as usual

    call: of the reward model's last layer of self attention (the paper's), or another. response [b, n], True at the
    tokens of the answer: padding on either side and answers of uneven lengths are told by it alone. beta 0 is the
    sparse reward. As the sum is kept for any beta, the best policies stay the same (potential-based shaping).
    Where the last token has all its weight on the prompt, the reward stays at the end. No gradient goes through it.

    Source: Chan et al., Dense Reward for Free in Reinforcement Learning from Human Feedback, arXiv:2402.00782 (ABC),
    and its released redistribution.py, which takes one example, of one map: heads are averaged before, as here.
    """
    return _spread("attention_reward", credit(call, response), reward, response, beta)


def generator_reward(call: Any, reward: Tensor, response: Tensor, *, beta: float = 1.0) -> Tensor:
    """The same from the generating model's own attention (ABC-D), where the reward model's cannot be read:
    a_t = mean over the response's queries from t on of their weight on t, brought to shares.

    A released detail is left out: there the map stands one token further to the right."""
    return _spread("generator_reward", generator_credit(call, response), reward, response, beta)


@torch.no_grad()
def credit(call: Any, response: Tensor) -> Tensor:
    """a of attention_reward, [b, n], float32 at least. All on the last token where the response has no weight."""
    real = _checked(call, response)
    ends = _last(real)
    rows = real.new_zeros(real.shape, dtype=torch.float32)
    for end in ends.unique().tolist():
        weights: Tensor = call.weights(rows=slice(end, end + 1))[:, :, 0].mean(1)
        rows = rows.to(weights.dtype)
        rows[ends == end] = weights[ends == end]
    return _shares(rows, real, ends)


@torch.no_grad()
def generator_credit(call: Any, response: Tensor) -> Tensor:
    """a of generator_reward, [b, n], float32 at least."""
    real = _checked(call, response)
    total: Tensor | None = None
    for rows in call.blocks():
        weights = call.weights(rows=rows).mean(1) * real[:, rows, None]
        total = weights.sum(1) if total is None else total + weights.sum(1)
    assert total is not None
    later = real.flip(1).cumsum(1).flip(1).clamp_min(1)
    return _shares(total / later, real, _last(real))


def _spread(who: str, share: Tensor, reward: Tensor, response: Tensor, beta: float) -> Tensor:
    if not 0 <= beta <= 1:
        raise ValueError(f"{who}: beta={beta}; want the part that is spread, from 0 (none) to 1 (all)")
    if reward.shape != share.shape[:1]:
        raise ValueError(f"{who}: reward {list(reward.shape)} for {len(share)} texts; want one number for each")
    given = reward.detach().to(share.device, torch.promote_types(reward.dtype, share.dtype))
    end = torch.zeros_like(share).scatter_(1, _last(response.to(share.device, torch.bool))[:, None], 1.0)
    return given[:, None] * (beta * share + (1.0 - beta) * end)


def _shares(weights: Tensor, real: Tensor, ends: Tensor) -> Tensor:
    own = weights.clamp_min(0.0) * real
    total = own.sum(1, keepdim=True)
    end = torch.zeros_like(own).scatter_(1, ends[:, None], 1.0)
    return torch.where(total > 0, own / total.masked_fill(total == 0, 1.0), end)


def _checked(call: Any, response: Tensor) -> Tensor:
    # An open call's output is [b, h, n, e], a closed one's [b, n, dim]; only the first has keys of its own.
    b, n = len(call.output), call.output.shape[-2]
    m = call.key.shape[2] if isinstance(call, AttentionCall) else n
    if n != m or tuple(response.shape) != (b, n):
        raise ValueError(
            f"attention reward: {call.site.name} has {n} queries on {m} keys in {b} texts; got response "
            f"{list(response.shape)}, want [b, n] of a whole pass of self attention, without a cache before it"
        )
    real = response.to(call.output.device, torch.bool)
    if not bool(real.any(1).all()):
        raise ValueError("attention reward: a text has no response; leave it out, or say which of its tokens it is")
    return real


def _last(real: Tensor) -> Tensor:
    """The last True of each row, [b]."""
    return real.shape[1] - 1 - real.flip(1).long().argmax(1)
