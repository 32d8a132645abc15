"""IA-RED2: an interpreter before each group of layers says which patches matter, and the others leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.steer.common import numbers
from manyheads.steer.method import Prompt, steering
from manyheads.steer.thinning.patches import thinned_patches, tower_layers


class Interpreters(nn.Module):
    """One before each layer of `before`. I_j = mean over heads of sigmoid(q_h . k_jh / sqrt(d)), q = F_q P from the
    class token's state P, k_j = F_k X_j of patch j; no softmax. F_q, F_k: D x D with bias, d = D / heads."""

    def __init__(self, dim: int, heads: int, before: Sequence[int]):
        super().__init__()
        if dim % heads or not before or min(before) < 0 or sorted(set(before)) != list(before):
            raise ValueError(f"Interpreters: dim {dim} of {heads} heads, before ascending layers; got {list(before)}")
        self.heads, self.before = heads, list(before)
        self.query = nn.ModuleList(nn.Linear(dim, dim) for _ in before)
        self.key = nn.ModuleList(nn.Linear(dim, dim) for _ in before)

    def forward(self, group: int, states: Tensor) -> Tensor:
        """states [b, n, D] with the class token first -> I [b, n - 1] of the patches."""
        query = self.query[group](states[:, :1]).unflatten(-1, (self.heads, -1))
        key = self.key[group](states[:, 1:]).unflatten(-1, (self.heads, -1))
        importance: Tensor = ((query * key).sum(-1) * key.shape[-1] ** -0.5).sigmoid().mean(-1)
        return importance


@contextmanager
def interpreted(model: nn.Module, interpreters: Interpreters, threshold: float = 0.5) -> Iterator[list[Tensor]]:
    """Claim: what an interpreter calls unimportant can be left out, so that its heat map shows what the model needs.

    Before each group of layers patches with I_j > threshold stay (`Interpreters`); the class token always does, and
    what left stays out. Gives the list of I [b, n - 1] of the last pass, one per group, 0 where a patch had left.
    threshold 0 changes nothing.
    Source: arXiv 2106.12620; its code was not released, and the scale 1 / sqrt(d) is ours. For plain ViTs with a class
    token.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"interpreted: threshold lies from 0 to below 1; got {threshold}")
    maps: list[Tensor] = []

    def choose(group: int, states: Tensor, there: Tensor) -> Tensor:
        importance = interpreters(group, states)
        maps[group:] = [importance.detach() * there]
        return importance > threshold if threshold else torch.ones_like(there)

    with _grouped(model, interpreters, choose):
        yield maps


# group, states [b, n, D] and which patches are there [b, n - 1] -> which stay; None: all.
_Choice = Callable[[int, Tensor, Tensor], "Tensor | None"]


@contextmanager
def _grouped(model: nn.Module, interpreters: Interpreters, choose: _Choice) -> Iterator[None]:
    depth = len(tower_layers(model))
    if interpreters.before[-1] >= depth:
        raise ValueError(f"interpreters before layers {interpreters.before} of a model that has {depth}")

    def rule(layer: int, states: Tensor, there: Tensor) -> Tensor | None:
        if layer not in interpreters.before:
            return None
        stays = choose(interpreters.before.index(layer), states, there[:, 1:])
        return None if stays is None else torch.cat([there[:, :1], stays], 1)

    with thinned_patches(model, rule):
        yield


def fit_interpreters(
    model: Any,
    interpreters: Interpreters,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    penalty: float = 1.0,
    learning_rate: float = 1e-3,
    group: int = 0,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """REINFORCE of one group's interpreter; gives (mean reward, share of patches kept) of every batch.

    Patches stay by Bernoulli(I_j). Reward per image: 1 - (kept / patches)^2 if the class is right, -penalty if not;
    baseline: the reward of the greedy choice I_j > 0.5 (self-critical). Earlier groups choose greedily, later ones keep
    all: groups are trained one after the other. The model stays as it is. batches: (pixel_values, labels [b]). The
    paper tunes the model afterwards, and gives no value of `penalty` that could be read: 1 is ours.
    """
    drawn = torch.Generator().manual_seed(seed)
    chosen = nn.ModuleList([interpreters.query[group], interpreters.key[group]])
    optimiser, history = torch.optim.Adam(chosen.parameters(), lr=learning_rate), []
    for pixels, labels in batches:
        reward, share, chance = _rollout(model, interpreters, pixels, labels, group, penalty, drawn)
        greedy, _, _ = _rollout(model, interpreters, pixels, labels, group, penalty, None)
        optimiser.zero_grad()
        (-(reward - greedy) * chance).mean().backward()
        optimiser.step()
        history.append((float(reward.mean()), float(share.mean())))
    return history


def _rollout(
    model: Any,
    interpreters: Interpreters,
    pixels: Tensor,
    labels: Tensor,
    group: int,
    penalty: float,
    drawn: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward, share of patches kept, and log-probability of the choice, each [b]; drawn None: greedy."""
    told: list[tuple[Tensor, Tensor]] = []

    def choose(own: int, states: Tensor, there: Tensor) -> Tensor | None:
        if own > group:
            return None
        with torch.set_grad_enabled(own == group):
            importance = interpreters(own, states.detach()).clamp(1e-6, 1 - 1e-6)
            stays: Tensor = importance > 0.5
            if own == group and drawn is not None:
                stays = torch.rand(importance.shape, generator=drawn).to(importance.device) < importance.detach()
            if own == group:
                chance = torch.where(stays, importance.log(), (-importance).log1p())
                told.append(((stays & there).float().mean(1), (chance * there).sum(1)))
        return stays

    with torch.no_grad(), _grouped(model, interpreters, choose):
        logits = model(pixels).logits
    share, chance = told[0]
    right = logits.argmax(-1) == labels
    return torch.where(right, 1 - share**2, torch.full_like(share, -penalty)), share, chance


@steering(
    "interpreted",
    title="patches that an interpreter finds unimportant leave the tower (IA-RED2)",
    source="arXiv 2106.12620",
    kinds=("dual-encoder",),
    neutral={"threshold": 0.0},
    strength="threshold",
    reach=(0.0, 1.0),
    towers=("image",),
)
def _open(
    model: nn.Module, prompt: Prompt, *, interpreters: str, heads: int, before: str, threshold: float = 0.5
) -> AbstractContextManager[list[Tensor]]:
    """interpreters: a safetensors file of trained `Interpreters` with so many heads, before those layers, 1,3."""
    from safetensors.torch import load_file

    weights = load_file(interpreters)
    own = next(model.parameters())
    made = Interpreters(weights["query.0.weight"].shape[1], heads, numbers(before, "interpreted: before"))
    made.load_state_dict(weights)
    return interpreted(model, made.to(own.device, own.dtype), threshold)
