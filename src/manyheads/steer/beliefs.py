"""GridToM: heads that know what somebody else believes, found by probes on a world of two rooms, and pushed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.positions import placed
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import record, tap
from manyheads.hosts.thin import check_whole
from manyheads.steer.method import Prompt, steering
from manyheads.steer.offsets import Offsets, load_offsets

ROOMS, THINGS, PEOPLE = ("red room", "blue room"), ("ball", "key", "cup", "book"), ("Ann", "Ben", "Cid", "Dora")


@dataclass(frozen=True)
class Story:
    """text: what happens, and a question about where somebody believes a thing to be. true_belief: whether that is
    where it is. answer: the room that is believed; actual: the room that it is in."""

    text: str
    true_belief: bool
    answer: str
    actual: str


def story(rng: random.Random, *, seen: bool | None = None) -> Story:
    """A thing is put into a room, somebody leaves or stays, the thing is moved, and it is asked where they look for it.
    seen: whether the asked person saw the move; drawn where not said."""
    who, mover = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    first, second = rng.sample(ROOMS, 2)
    watched = rng.random() < 0.5 if seen is None else seen
    door = f"{who} stays and watches" if watched else f"{who} leaves and sees nothing"
    text = (
        f"{who} puts the {thing} in the {first}. {door}. {mover} moves the {thing} to the {second}. "
        f"{who} looks for the {thing} in the"
    )
    return Story(text, watched, second if watched else first, second)


def stories(count: int, seed: int = 0) -> list[Story]:
    """As many of true beliefs as of false ones, give or take one, in a drawn order."""
    rng = random.Random(seed)
    made = [story(rng, seen=bool(i % 2)) for i in range(count)]
    rng.shuffle(made)
    return made


@torch.no_grad()
def head_states(model: Any, inputs: Sequence[Mapping[str, Any]]) -> Tensor:
    """[examples, layers, heads, head dim]: what every head puts out at the prompt's last place, before the output
    projection. One row to an example."""
    found = []
    for own in inputs:
        with record(model, stack=text_stack(model), kind="self") as calls:
            model(**placed(model, own), use_cache=False)
        found.append(torch.stack([opened(call, "head_states").output[0, :, -1].float() for call in calls]))
    return torch.stack(found)


@dataclass(frozen=True)
class Probes:
    """accuracy [layers, heads], on examples that were not fitted. directions [layers, heads, head dim] of length 1,
    towards label 1. deviations [layers, heads]: of what the fitted examples have along them."""

    accuracy: Tensor
    directions: Tensor
    deviations: Tensor

    def best(self, count: int) -> list[tuple[int, int]]:
        layers, heads = self.accuracy.shape
        if not 1 <= count <= layers * heads:
            raise ValueError(f"Probes.best: count={count}; there are {layers * heads} heads")
        order = self.accuracy.flatten().argsort(descending=True, stable=True)[:count].tolist()
        return [divmod(place, heads) for place in order]

    def offsets(self, heads: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        """deviation * direction of each head: what `pushed` takes."""
        return {place: self.deviations[place] * self.directions[place] for place in heads}


def fit_probes(states: Tensor, labels: Tensor, *, fitted: float = 0.7) -> Probes:
    """A logistic regression per head (scikit-learn's, as it comes) of labels [examples] bool on states [examples,
    layers, heads, head dim]; the first `fitted` share is fitted, the rest gives the accuracy."""
    from sklearn.linear_model import LogisticRegression

    count = round(fitted * len(states))
    train, rest = labels[:count].bool(), labels[count:].bool()
    if states.dim() != 4 or len(states) != len(labels) or not len(rest) or train.all() or not train.any():
        raise ValueError(
            f"fit_probes: {list(states.shape)} states and {len(labels)} labels; want [examples, layers, heads, width], "
            "with both labels among those fitted and some left over"
        )
    _, layers, heads, width = states.shape
    accuracy, deviations = torch.zeros(layers, heads), torch.zeros(layers, heads)
    directions = torch.zeros(layers, heads, width)
    for layer in range(layers):
        for head in range(heads):
            own = states[:, layer, head].float()
            probe = LogisticRegression(max_iter=1000).fit(own[:count].numpy(), train.numpy())
            accuracy[layer, head] = float(probe.score(own[count:].numpy(), rest.numpy()))
            direction = torch.from_numpy(probe.coef_[0]).float()
            directions[layer, head] = nn.functional.normalize(direction, dim=0)
            deviations[layer, head] = (own[:count] @ directions[layer, head]).std(correction=0)
    return Probes(accuracy, directions, deviations)


@contextmanager
def pushed(model: Any, offsets: Offsets, scale: float, *, first: int = 0) -> Iterator[None]:
    """Claim: a few heads hold whose belief is meant; pushed along their probes' directions the model answers for that
    person and not for the world.

    o_h' = o_h + scale sigma_h theta_h at places from `first` on (the prompt's last one, for what is generated), theta
    the probe's direction, sigma the deviation of examples along it; offsets are sigma theta, as of `Probes.offsets`.
    scale 0 changes nothing, below 0 pushes to the other label.
    Source: arXiv 2506.14224, Annaisavailable/GridToM. Its hook edits columns behind the output projection, although
    probes are fitted before it; here both are before it, as in inference-time intervention (2306.03341).
    """
    if not offsets:
        raise ValueError("pushed: offsets is empty; give Probes.offsets(heads)")
    by_layer: dict[int, list[int]] = {}
    for layer, head in offsets:
        by_layer.setdefault(layer, []).append(head)

    def reader(call: Any) -> Tensor | None:
        own = opened(call, "pushed")
        check_whole(call.site.module, "pushed")
        start = max(0, first - (own.key.shape[2] - own.query.shape[2]))
        if scale == 0 or start >= own.query.shape[2]:
            return None
        heads = own.check_heads(by_layer[own.layer])
        vectors = torch.stack([offsets[own.layer, head] for head in heads]).to(own.output)
        if vectors.shape[-1] != own.output.shape[-1]:
            raise ValueError(
                f"{own.site.path}: offsets have {vectors.shape[-1]} features, heads {own.output.shape[-1]}"
            )
        late = torch.arange(own.query.shape[2], device=vectors.device) >= start
        return own.replaced(own.output[:, heads] + scale * vectors[None, :, None] * late[:, None], heads)

    with tap(model, reader, layers=sorted(by_layer), stack=text_stack(model), kind="self"):
        yield


@steering(
    "push",
    title="chosen heads pushed along probes' directions where the answer begins",
    source="arXiv 2506.14224",
    kinds=("language", "vision-language"),
    neutral={"scale": 0.0},
    strength="scale",
    reach=(0.0, 4.0),
)
def _open(model: Any, prompt: Prompt, *, file: str, scale: float = 1.0) -> AbstractContextManager[None]:
    """file: Probes.offsets, as save_offsets writes them."""
    return pushed(model, load_offsets(file), scale, first=prompt.inputs["input_ids"].shape[1] - 1)
