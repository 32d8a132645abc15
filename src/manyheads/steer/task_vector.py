"""A task as a weighted sum of heads' outputs, learned and put into prompts that show no example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import AttentionCall, tap
from manyheads.steer.common import changed


@dataclass(frozen=True)
class TaskVector:
    """weights [layers, heads]; outputs [layers, heads, e]: of each head at the last token, the mean over prompts."""

    weights: Tensor
    outputs: Tensor

    @contextmanager
    def added(self, model: Any, scale: float = 1.0, *, stack: str | None = None) -> Iterator[None]:
        """The model with the vector at the last token of what it reads; scale 0 changes nothing."""

        def change(call: AttentionCall, _: list[int] | None) -> Tensor | None:
            if scale == 0:
                return None
            own = scale * self.weights[call.layer][:, None] * self.outputs[call.layer]
            out = call.output.clone()
            out[:, :, -1] = out[:, :, -1] + own.to(out)
            return out

        with changed(model, None, change, stack, of_text=True):
            yield


@torch.no_grad()
def head_means(model: Any, input_ids: Tensor, *, stack: str | None = None) -> Tensor:
    """[layers, heads, e]: each head's output at the last token, the mean over the prompts [b, n]."""
    found: dict[int, Tensor] = {}

    def read(call: Any) -> None:
        found[call.layer] = opened(call, "a task vector").output[:, :, -1].mean(0)

    with tap(model, read, stack=text_stack(model, stack), kind="self"):
        _logits(model, input_ids)
    if len({own.shape for own in found.values()}) > 1:
        raise ValueError("a task vector: layers differ in heads or head dimension")
    return torch.stack([found[layer] for layer in sorted(found)])


def learn_task_vector(
    model: Any,
    prompts: Tensor,
    questions: Tensor,
    answers: Tensor,
    *,
    steps: int = 100,
    lr: float = 0.1,
    stack: str | None = None,
) -> TaskVector:
    """Claim: a task that examples show is held by few heads at the last token, and a learned sum of their outputs does
    it without examples, better than an unweighted one.

    v_l = sum_h w_lh W_O^h o_lh, o_lh the mean output of a head at the last token of `prompts` [b, n] (examples, then a
    question), added to layer l's attention at the last token of `questions` [c, m]; w minimises the loss of `answers`
    [c] there, the model frozen, by Adam from zero. Rows without padding. Neutral: w = 0. Source: arXiv 2502.05390,
    which adds v_l to the layer's hidden state; o goes through the layer's own W_O here, which is the same where nothing
    stands between W_O and the residual.
    """
    if prompts.dim() != 2 or questions.dim() != 2 or answers.shape != questions.shape[:1]:
        raise ValueError(
            f"prompts {list(prompts.shape)}, questions {list(questions.shape)}, answers {list(answers.shape)}: want "
            "[b, n] and [c, m] of ids without padding, and [c]"
        )
    outputs = head_means(model, prompts, stack=stack)
    weights = torch.zeros(outputs.shape[:2], device=outputs.device, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr)
    with torch.enable_grad():
        for _ in range(steps):
            with TaskVector(weights, outputs).added(model, stack=stack):
                loss = cross_entropy(_logits(model, questions)[:, -1].float(), answers)
            (weights.grad,) = torch.autograd.grad(loss, [weights])
            optimiser.step()
    return TaskVector(weights.detach(), outputs)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Of a model of the library's, or of a module that gives logits alone."""
    if hasattr(model, "config"):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found
    plain: Tensor = model(ids)
    return plain
