"""Training of what a form of personalisation trains, and of nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.runs.steps import Tell, silent
from manyheads.steer.personal.form import Form
from manyheads.steer.personal.passes import draw_noise, noisy
from manyheads.steer.personal.subjects import Album, Subject, learn_words, word_numbers

# Pictures that the model draws itself to keep what it knew, where a form has a prior.
PRIOR, PRIOR_STEPS = 32, 10
MOST_STEPS = 100_000


@dataclass(frozen=True)
class Plan:
    """steps of `batch` pictures, as many drawn before beside them where the form has a prior; rate: None is the form's
    own. The same seed gives the same batches, noise and times to every form."""

    steps: int = 200
    batch: int = 4
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= MOST_STEPS or self.batch < 1 or (self.rate is not None and not 0 < self.rate < 10):
            raise ValueError(f"steps={self.steps}, batch={self.batch}, rate={self.rate}: want 0 to {MOST_STEPS} steps")


def with_words(model: Any, subjects: Sequence[Subject]) -> Any:
    """A copy of the model that knows the subjects' words, and is what it was on every caption of before."""
    own = copy.deepcopy(model)
    learn_words(own, subjects)
    return own.eval().requires_grad_(False)


def personalise(
    model: Any, album: Album, form: Form, arguments: Mapping[str, Any], plan: Plan, *, tell: Tell = silent
) -> Any:
    """A copy of a model that knows the subjects' words (`with_words`), trained on the album by a form's loss.

    Only the subjects' words and the projections of cross attention that the form names change; the word that begins
    every caption gives no gradient to them, as in Custom Diffusion, whose code the papers here begin with: it is all
    that a drawing without a caption reads. With a prior, + the velocity's error on pictures that the model drew of the
    captions in words of before. ValueError where the loss is no number any more.
    """
    lesson = form.open(model, album, **{**form.arguments, **arguments})
    kept, told = _prior(model, album, plan.seed) if form.prior else (album.pictures[:0], [])
    learner = copy.deepcopy(model)
    trained = list(_opened(learner, album, form))
    optimizer = torch.optim.AdamW(trained, lr=plan.rate or form.rate, weight_decay=0.0)
    for step in range(plan.steps):
        tell(step, plan.steps, "")
        with _begins_quietly(learner):
            loss = _loss(learner, album, lesson, (kept, told), plan, step)
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"{form.name}: the loss is {float(loss.detach())} at step {step}: give a smaller --rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    tell(plan.steps, plan.steps, "")
    for hook in learner.__dict__.pop("_word_hooks"):
        hook.remove()
    return learner.eval().requires_grad_(False)


def _loss(model: Any, album: Album, lesson: Any, prior: tuple[Tensor, list[str]], plan: Plan, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    rows = torch.randint(len(album.pictures), (plan.batch,), generator=generator).tolist()
    kept, told = prior
    before = torch.randint(len(kept), (plan.batch,), generator=generator).tolist() if len(kept) else []
    pictures = torch.cat([album.pictures[rows], kept[before]])
    captions = [*lesson.captions(step, rows), *(told[i] for i in before)]
    noise, times = draw_noise(model, len(pictures), plan.seed * 1_000_003 + step)
    made = noisy(model, pictures, noise, times, captions, rows)
    loss: Tensor = lesson(step, made)
    return loss + made.error[len(rows) :].mean() if before else loss


def _prior(model: Any, album: Album, seed: int) -> tuple[Tensor, list[str]]:
    told = [album.before(album.captions[i % len(album.captions)]) for i in range(PRIOR)]
    pictures = model.sample(told, steps=PRIOR_STEPS, seed=seed + 1)
    return pictures.clamp(-1, 1), told


def _opened(model: Any, album: Album, form: Form) -> Iterator[nn.Parameter]:
    """The parameters that learn; of the words' table only the subjects' rows have a gradient, and with it change."""
    model.requires_grad_(False)
    numbers = word_numbers(model, album.subjects)
    table = model.words.weight.requires_grad_(True)
    mine = torch.zeros(len(table), 1, dtype=table.dtype, device=table.device)
    mine[numbers] = 1
    model._word_hooks = [table.register_hook(lambda grad: grad * mine)]
    yield table
    for name, module in _crosses(model):
        for own in form.trains:
            if not isinstance(getattr(module, own, None), nn.Linear):
                raise ValueError(
                    f"{form.name} trains {own} of cross attention; {name} ({type(module).__name__}) has none"
                )
            yield getattr(module, own).weight.requires_grad_(True)


def _crosses(model: Any) -> list[tuple[str, Any]]:
    return [(name, own) for name, own in model.named_modules() if name.split(".")[-1] == "cross_attention"]


@contextmanager
def _begins_quietly(model: Any) -> Iterator[None]:
    """While open, the first word's key and value give no gradient."""

    def quiet(module: Any, given: Any, made: Tensor) -> Tensor:
        return torch.cat([made[:, :1].detach(), made[:, 1:]], 1)

    hooks = [
        getattr(module, own).register_forward_hook(quiet)
        for _, module in _crosses(model)
        for own in ("k_proj", "v_proj")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
