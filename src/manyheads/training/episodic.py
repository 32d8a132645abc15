"""A policy that remembers by attending to its last steps, and its training by reinforcement on bandits (TrMRL)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


class _Layer(nn.Module):
    """x + attention, then x + MLP, with no norm: the initialisation alone keeps it in bounds."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [b, n, d], real [b, 1, 1, n], True for a step that there is -> [b, n, d]."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=real).transpose(1, 2).flatten(2)
        x = x + self.out_proj(read)
        return x + self.linear2(self.linear1(x).relu())


class EpisodicPolicy(nn.Module):
    """What to do at a step, from the last `window` steps of the episode: a working memory that layers of attention turn
    into an episodic one.

        x_j = E s_j + p_(j - first);  x <- x + MHA(x);  x <- x + W_2 relu(W_1 x);  logits_t = W x_t, the window's last

    steps [b, n, inputs]: what is seen at each step, with the action and the reward of the step before. Answers
    [b, n, actions]: each from its own window alone, within which every step sees every other. E has no bias, and there
    is no layer norm; by T-Fixup, E is normal with a deviation of d^-1/2 (9 L)^-1/4, W_1, W_2 and the output projection
    are scaled by 0.67 L^-1/4, and the projections of queries, keys and values by 2^1/2 times as much.
    Source: Melo, Transformers are Meta-Reinforcement Learners, arXiv:2206.06614, and its
    `gaussian_transformer_encoder_policy.py`, which is followed where it scales all three projections and T-Fixup the
    values alone, and in having no causal mask inside a window. Different: answers are logits of actions, not the mean
    and deviation of continuous ones; windows at the start of an episode are short, their positions counted from their
    first step (how the code fills them was not read).
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        *,
        dim: int = 32,
        heads: int = 4,
        layers: int = 2,
        window: int = 5,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "actions": actions, "dim": dim, "heads": heads, "layers": layers, "window": window,
                 "hidden": hidden}  # fmt: skip
        if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            raise ValueError(f"EpisodicPolicy: {', '.join(wrong)}; want at least 1 of each")
        if dim % heads:
            raise ValueError(f"EpisodicPolicy: dim={dim} is not divisible by heads={heads}; want a multiple")
        self.inputs, self.window = inputs, window
        self.embed = nn.Linear(inputs, dim, bias=False)
        self.places = nn.Parameter(torch.zeros(window, dim))
        self.layers = nn.ModuleList(_Layer(dim, heads, hidden) for _ in range(layers))
        self.answer = nn.Linear(dim, actions)
        t_fixup(self)

    def forward(self, steps: Tensor) -> Tensor:
        if steps.dim() != 3 or steps.shape[-1] != self.inputs or not steps.shape[1]:
            raise ValueError(f"EpisodicPolicy: steps of {list(steps.shape)}; want [batch, steps, {self.inputs}]")
        count, n = steps.shape[:2]
        first = (torch.arange(n) - self.window + 1).clamp(min=0)
        inside = first[:, None] + torch.arange(self.window)  # [n, window]: which steps each window holds
        here = torch.arange(n)[:, None]
        real = (inside <= here).to(steps.device)
        inside, last = inside.clamp(max=n - 1), (here - first[:, None])[:, 0]
        x = self.embed(steps)[:, inside.to(steps.device)] + self.places  # [b, n, window, d]
        mask = real[None, :, None, None].expand(count, n, 1, 1, self.window).flatten(0, 1)
        x = x.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, mask)
        read = x.unflatten(0, (count, n))[:, torch.arange(n), last]
        logits: Tensor = self.answer(read)
        return logits


@torch.no_grad()
def t_fixup(policy: EpisodicPolicy) -> None:
    """Draws and scales the weights as the class says, in place."""
    depth, dim = len(policy.layers), policy.embed.weight.shape[0]
    for weight in (policy.embed.weight, policy.places):
        weight.normal_(0.0, dim**-0.5 * (9 * depth) ** -0.25)
    scale = 0.67 * depth**-0.25
    for layer in policy.layers:
        assert isinstance(layer, _Layer)
        for linear in (layer.linear1, layer.linear2, layer.out_proj, layer.in_proj):
            nn.init.xavier_uniform_(linear.weight)
            linear.weight.mul_(scale * (2**0.5 if linear is layer.in_proj else 1.0))
            nn.init.zeros_(linear.bias)


class Episodes(NamedTuple):
    """Of a batch: steps [b, n, arms + 1], what the policy saw; actions [b, n]; rewards [b, n]; chances [b, n], log
    probabilities of the actions taken, with their gradient."""

    steps: Tensor
    actions: Tensor
    rewards: Tensor
    chances: Tensor


def play(policy: EpisodicPolicy, pays: Tensor, length: int, rng: Generator) -> Episodes:
    """Plays bandits for `length` steps each: pays [b, arms] is the chance that an arm pays 1. A step is what was done
    before, as one of `arms`, and what that paid; the first is all zero. Nothing else tells which arms pay."""
    count, arms = pays.shape
    if policy.inputs != arms + 1 or policy.answer.out_features != arms:
        raise ValueError(
            f"play: {arms} arms want a policy with inputs={arms + 1} and actions={arms}, got inputs={policy.inputs} "
            f"and actions={policy.answer.out_features}"
        )
    steps = [torch.zeros(count, arms + 1)]
    actions, rewards, chances = [], [], []
    for _ in range(length):
        # Only the last window is answered: what came before it has been.
        recent = torch.stack(steps[-policy.window :], 1)
        told = policy(recent)[:, -1].log_softmax(-1)
        action = torch.multinomial(told.detach().exp(), 1, generator=rng)
        reward = (torch.rand(count, 1, generator=rng) < pays.gather(1, action)).float()
        actions.append(action)
        rewards.append(reward)
        chances.append(told.gather(1, action))
        steps.append(torch.cat([F.one_hot(action[:, 0], arms).float(), reward], 1))
    return Episodes(torch.stack(steps[:-1], 1), *(torch.cat(each, 1) for each in (actions, rewards, chances)))


def policy_loss(episodes: Episodes, discount: float = 1.0) -> Tensor:
    """-(1 / b) sum_t log pi(a_t) (G_t - mean over the batch of G_t), G_t = sum_(s >= t) discount^(s - t) r_s: REINFORCE
    with a baseline, where the paper trains by PPO."""
    rewards = episodes.rewards
    later = torch.arange(rewards.shape[1])
    weight = torch.where(later[None] >= later[:, None], discount ** (later[None] - later[:, None]).clamp(min=0), 0.0)
    returns = rewards @ weight.to(rewards).T
    return -(episodes.chances * (returns - returns.mean(0))).sum(1).mean()


def train_on_bandits(
    policy: EpisodicPolicy,
    *,
    updates: int = 150,
    episodes: int = 64,
    length: int = 6,
    learning_rate: float = 0.01,
    pays: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """The mean reward of each update. In each episode one arm, drawn anew, pays with chance `pays`, the others never:
    who does not remember has pays / arms a step."""
    if min(updates, episodes, length) < 1 or not 0 < pays <= 1:
        raise ValueError(
            f"train_on_bandits: updates={updates}, episodes={episodes}, length={length}, pays={pays}; want at least 1 "
            "of each, and a chance above 0"
        )
    rng, arms = torch.Generator().manual_seed(seed), policy.answer.out_features
    optimiser, curve = torch.optim.Adam(policy.parameters(), learning_rate), []
    for _ in range(updates):
        good = torch.randint(arms, (episodes,), generator=rng)
        played = play(policy, pays * F.one_hot(good, arms).float(), length, rng)
        optimiser.zero_grad()
        policy_loss(played).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        curve.append(float(played.rewards.mean()))
    return curve
