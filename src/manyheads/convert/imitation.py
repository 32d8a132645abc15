"""What a mechanism learns from the softmax attention that it replaces, on the same inputs: three published losses.

output   |o - o'|^2 / |o'|^2 of the whole layer's output; trains all of the mechanism
heads    1000 mean (y - y')^2 of the heads' outputs before they are joined (LoLCATs, Zhang et al., arXiv:2410.10254)
weights  mean over queries of - sum_j a'_ij log a_ij, the cross-entropy of attention weights (Hedgehog,
         arXiv:2402.04347)

A prime marks softmax's. The last two train only what the host's weights do not fill: feature maps, factors; the rest
stays as it is, as in the released code of LoLCATs. Inputs are those of the unchanged host, so that no layer sees
another's errors: a step is one pass of the host without gradients, up to the last of the chosen layers' attention, and
each mechanism's own pass and gradients. No logits are made, and none flow through the trunk; queries, keys and values
that host and mechanism project alike, by weights that stay, are the host's pass' own. What the host gave on a row is
held for the steps in which the row comes back, which then are the mechanisms' passes alone, to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.convert.hosted import hosted
from manyheads.convert.keeping import Keeping, facts, kept_file
from manyheads.convert.loop import take_steps
from manyheads.runs.steps import Tell, silent

# Bytes of what the host saw and gave that are held.
REMEMBERED = 2 << 30


class Seen(NamedTuple):
    """One pass of the layer that is learnt from: x and its output [b, n, e], its heads' outputs [b, n, h d]; what its
    projections gave, of those that the mechanism has too."""

    x: Tensor
    output: Tensor
    heads: Tensor
    projected: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.x, self.output, self.heads, *self.projected.values()))


@dataclass(frozen=True)
class Loss:
    """apart: of the mechanism, the softmax layer and what that saw and gave. whole: trains all of the mechanism."""

    apart: Callable[[Any, Any, Seen], Tensor]
    whole: bool
    rate: float


def _output(learner: Any, teacher: Any, seen: Seen) -> Tensor:
    return (learner(seen.x).output - seen.output).square().sum() / seen.output.square().sum()


def _heads(learner: Any, teacher: Any, seen: Seen) -> Tensor:
    heads = _unjoined(learner, seen.x)
    if heads.shape != seen.heads.shape:
        raise ValueError(
            f"{learner.card.name}: its heads give {tuple(heads.shape)}, softmax's {tuple(seen.heads.shape)}: "
            "these cannot be compared, take --transfer-loss output"
        )
    return 1000 * (heads - seen.heads).square().mean()


def _weights(learner: Any, teacher: Any, seen: Seen) -> Tensor:
    with torch.no_grad():
        wanted = teacher(seen.x, need_weights=True).weights
    found = learner(seen.x, need_weights=True).weights
    if found is None or found.shape != wanted.shape:
        raise ValueError(f"{learner.card.name}: gives no weights of tokens: take --transfer-loss output")
    return -(wanted * found.clamp(min=torch.finfo(found.dtype).tiny).log()).sum(-1).mean()


LOSSES: Mapping[str, Loss] = {
    "output": Loss(_output, True, 1e-3),
    "heads": Loss(_heads, False, 1e-2),
    "weights": Loss(_weights, False, 1e-2),
}


def check_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"--transfer-loss {name!r}: want one of {', '.join(LOSSES)}")
    return LOSSES[name]


@contextmanager
def before_joining(mechanism: Any, tell: Callable[[Tensor], Any]) -> Iterator[None]:
    """Tells what the heads give to the projection that joins them."""
    joins = getattr(mechanism, "o_proj", None)
    if not isinstance(joins, nn.Linear):
        raise ValueError(f"{mechanism.card.name}: has no o_proj that joins its heads: take --transfer-loss output")
    hook = joins.register_forward_pre_hook(lambda module, args: tell(args[0]))
    try:
        yield
    finally:
        hook.remove()


class _Enough(Exception):
    """What was wanted of a pass is there, in its argument: the rest of it would be computed for nothing."""


def _unjoined(mechanism: Any, x: Tensor) -> Tensor:
    """What the heads give, in a pass that ends before they are joined."""

    def end(heads: Tensor) -> None:
        raise _Enough(heads)

    try:
        with before_joining(mechanism, end):
            mechanism(x)
    except _Enough as found:
        heads: Tensor = found.args[0]
        return heads
    raise ValueError(f"{mechanism.card.name}: reads o_proj without calling it: take --transfer-loss output")


def learnt(learner: Any, teacher: Any, loss: Loss) -> list[nn.Parameter]:
    """The parameters that a loss trains; ValueError where there are none."""
    filled = dict(teacher.named_parameters())
    found = [
        parameter
        for name, parameter in learner.named_parameters()
        if loss.whole or name not in filled or not _fits(name, parameter, filled[name])
    ]
    if not found:
        raise ValueError(
            f"{learner.card.name}: the host's weights fill all of it, so that heads and weights have nothing to train: "
            "take --transfer-loss output"
        )
    return found


def _fits(name: str, ours: Tensor, theirs: Tensor) -> bool:
    """Keys and values may be repeated, for a mechanism that shares none."""
    repeated = name.startswith(("k_proj", "v_proj")) and ours.shape[0] % theirs.shape[0] == 0
    return ours.shape == theirs.shape or (repeated and ours.shape[1:] == theirs.shape[1:])


def same_projections(learner: Any, teacher: Any, trained: Sequence[nn.Parameter]) -> tuple[str, ...]:
    """Which projections of queries, keys and values are linear, the same in both, and not trained."""
    learning = {id(parameter) for parameter in trained}
    found = []
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = getattr(learner, name, None), getattr(teacher, name, None)
        if not (type(ours) is type(theirs) is nn.Linear) or any(id(p) in learning for p in ours.parameters()):
            continue
        mine, other = ours.state_dict(), theirs.state_dict()
        if mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine):
            found.append(name)
    return tuple(found)


@contextmanager
def _recalled(learner: Any, seen: Seen) -> Iterator[None]:
    """Inside, projections of `seen.x` are what the teacher's were; those of anything else are computed."""

    def either(x: Tensor, linear: nn.Linear, output: Tensor) -> Tensor:
        return output if x is seen.x else nn.functional.linear(x, linear.weight, linear.bias)

    linears = {name: getattr(learner, name) for name in seen.projected}
    for name, linear in linears.items():
        linear.forward = partial(either, linear=linear, output=seen.projected[name])
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward


class _Pair(NamedTuple):
    """A mechanism, the softmax attention that it learns from, and the projections that both have."""

    learner: Any
    teacher: Any
    same: tuple[str, ...]


def transfer(
    made: Any,
    model: Any,
    layers: Sequence[int],
    rows: Sequence[Sequence[int]],
    *,
    steps: int,
    loss: str = "output",
    rate: float | None = None,
    keep: Path | None = None,
    remember: int = REMEMBERED,
    tell: Tell = silent,
) -> list[float]:
    """Trains the mechanisms of `layers` of `made`, where they stand, to give what the host's attention gives on the
    same inputs; returns the losses of the steps that it took, each the mean over layers. rows: of token ids, one for a
    step, from the start when they end. rate: of AdamW; 1e-3 for output, 1e-2 for the others, as published. keep: as
    `heal` has it, the beginning of the path of what a stopped run goes on from. remember: bytes of what the host
    gave to hold for when a row comes back; it changes the time that a step takes, and nothing else."""
    measure = check_loss(loss)
    if not rows:
        raise ValueError("attention transfer needs text: rows of token ids")
    teacher = hosted(model).requires_grad_(False)
    stack = teacher.model.stack
    stack.layers = stack.layers[: max(layers) + 1]
    both = {i: [own.layers[i].self_attn.mechanism for own in (made.model.stack, stack)] for i in layers}
    weights = [p for learner, softmax in both.values() for p in learnt(learner, softmax, measure)]
    pairs = {
        i: _Pair(learner, softmax, same_projections(learner, softmax, weights))
        for i, (learner, softmax) in both.items()
    }
    rate = measure.rate if rate is None else rate
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    keeping = None
    if keep is not None:
        text = json.dumps([list(row) for row in rows])
        plan = {"layers": list(layers), "steps": steps, "loss": loss, "rate": rate}
        keeping = Keeping(kept_file(keep), facts(made, model, text, plan))
    for pair in pairs.values():
        pair.learner.train()
    with _only(made, weights):
        learn = partial(_learn, _Host(teacher, pairs, rows, remember, steps), pairs, measure)
        losses = take_steps(made, optimizer, steps, learn, seed=0, keeping=keeping, tell=tell)
    made.eval()
    return losses


@dataclass
class _Host:
    """What the host saw and gave on the row of a step. remember: bytes to hold of it, of rows that come back."""

    teacher: Any
    pairs: Mapping[int, _Pair]
    rows: Sequence[Sequence[int]]
    remember: int
    steps: int
    held: dict[int, dict[int, Seen]] = field(default_factory=dict)

    def seen(self, step: int) -> dict[int, Seen]:
        at = step % len(self.rows)
        found = self.held.get(at)
        if found is None:
            found = _seen(self.teacher, self.pairs, torch.tensor([list(self.rows[at])], device=self.teacher.device))
            size = sum(one.nbytes for one in found.values())
            if step + len(self.rows) < self.steps and size <= self.remember:
                self.held[at] = found
                self.remember -= size
        return found


def _learn(host: _Host, pairs: Mapping[int, _Pair], measure: Loss, step: int) -> float:
    """The gradients of one step. Layers do not see each other, so that each has its own backward and one graph at a
    time is held."""
    seen, total = host.seen(step), 0.0
    for i, pair in pairs.items():
        with _recalled(pair.learner, seen[i]):
            apart = measure.apart(pair.learner, pair.teacher, seen[i])
        (apart / len(pairs)).backward()
        total += float(apart.detach()) / len(pairs)
    return total


@contextmanager
def _only(made: Any, weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Gradients for these alone; afterwards for whatever had them."""
    before = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    made.requires_grad_(False)
    for parameter in weights:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(before[name])


@torch.no_grad()
def _seen(teacher: Any, pairs: Mapping[int, _Pair], ids: Tensor) -> dict[int, Seen]:
    """What each of the host's layers saw and gave, in one pass that ends behind the last of them."""
    found: dict[int, Seen] = {}
    heads: dict[int, Tensor] = {}
    projected: dict[int, dict[str, Tensor]] = {i: {} for i in pairs}

    def saw(at: int, module: Any, args: Any, result: Any) -> None:
        found[at] = Seen(args[0], result.output, heads[at], projected[at])
        if len(found) == len(pairs):
            raise _Enough

    def gave(at: int, name: str, module: Any, args: Any, output: Tensor) -> None:
        projected[at][name] = output

    with ExitStack() as stack:
        for i, pair in pairs.items():
            for name in pair.same:
                linear = getattr(pair.teacher, name)
                stack.callback(linear.register_forward_hook(partial(gave, i, name)).remove)
            stack.enter_context(before_joining(pair.teacher, partial(heads.__setitem__, i)))
            stack.callback(pair.teacher.register_forward_hook(partial(saw, i)).remove)
        with suppress(_Enough):
            teacher.model(ids, use_cache=False)
    return found
