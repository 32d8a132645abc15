"""What a head is worth: the slope of a gate on its output, what ablating it costs, and pruning one head after another.

    head output <- g_h Att_h(x);   I_h = mean over samples of |dL / dg_h| at g = 1 = |<Att_h, dL / dAtt_h>|
    ablation:   L with the head's output in place of 0 (or of its mean over all samples and tokens), less L
Claim: most heads can be pruned at test time without loss, in the order of I, a share at a time.
Source: Michel et al. arXiv 1905.10650 (pmichel31415/are-16-heads-really-better-than-1). The paper takes |.| of each
sample's slope, as here; the code takes it of every token's part (`per="token"`). Both divide each layer's scores by
their 2-norm (`normalise`). Greedy pruning measures I again after every step, as theirs does; `by="loss"` tries every
head that is left instead. No weight is changed: taps put heads' outputs in the others' place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manyheads.explain.attributions.feed import still
from manyheads.explain.detectors.reading import even
from manyheads.explain.detectors.subject import Sample, Samples, Subject
from manyheads.hosts.calls import opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import record, tap

# The model's output and its inputs by name -> one number.
Loss = Callable[[Any, dict[str, Any]], Tensor]
Head = tuple[int, int]


def default_loss(output: Any, named: dict[str, Any]) -> Tensor:
    """The model's own loss where its inputs have labels; else that of the next tokens."""
    if getattr(output, "loss", None) is not None:
        found: Tensor = output.loss
        return found
    logits, ids = getattr(output, "logits", None), named.get("input_ids")
    if named.get("decoder_input_ids") is not None:
        ids = named["decoder_input_ids"]
    if logits is None or ids is None or logits.dim() != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        raise ValueError(
            "importance needs a loss, and this model's output has none: give loss=, a function of (output, inputs), or "
            "inputs= with labels"
        )
    return cross_entropy(logits[0, :-1].float(), ids[0, 1:])


@dataclass
class Importance:
    """A model, samples and a loss. where: inputs=, text=, length=, count=, seed= as in `detect`."""

    subject: Subject
    samples: list[Sample]
    loss: Loss | None = None

    @classmethod
    def of(
        cls, model: nn.Module | Loaded, loss: Loss | None = None, stack: str | None = None, **where: Any
    ) -> Importance:
        subject = Subject(model, stack)
        return cls(subject, Samples(subject, **where).of("text"), loss)

    def __post_init__(self) -> None:
        if self.loss is None:
            if not self.subject.generates and not any("labels" in sample.named for sample in self.samples):
                raise ValueError(
                    f"importance: {self.subject.name} does not predict the next token: give loss=, a function of "
                    "(output, inputs), or inputs= with labels"
                )
            self.loss = default_loss

    # -- gates -----------------------------------------------------------------------------------------------------

    def slopes(self, pruned: Sequence[Head] = (), per: Literal["sample", "token"] = "sample") -> Tensor:
        """dL / dg, [samples, layers, heads], signed; per token: the sum of its parts' sizes."""
        if per not in ("sample", "token"):
            raise ValueError(f"per={per!r}: slopes are taken per sample or per token")
        return torch.stack([self._slope(sample, pruned, per) for sample in self.samples])

    def gradient(
        self, pruned: Sequence[Head] = (), *, per: Literal["sample", "token"] = "sample", normalise: bool = True
    ) -> Tensor:
        """I, [layers, heads]."""
        found = self.slopes(pruned, per).abs().mean(0)
        return found / found.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny) if normalise else found

    def _slope(self, sample: Sample, pruned: Sequence[Head], per: str) -> Tensor:
        model, gone = self.subject.model, dict.fromkeys(pruned)
        taps = record(model, gradients=True, **self._where)
        with still(model), torch.enable_grad(), self.changed(gone), taps as calls:
            loss = self._loss(sample)
            for call in calls:
                opened(call, "importance")
            loss.backward()
        rows = []
        for call in calls:
            grad = call.output.grad
            parts = torch.zeros_like(call.output) if grad is None else call.output.detach() * grad
            by_token = parts.double().sum((0, 3))
            rows.append((by_token.sum(-1) if per == "sample" else by_token.abs().sum(-1)).cpu())
        return even(rows)

    # -- ablation --------------------------------------------------------------------------------------------------

    def ablation(self, instead: Literal["zero", "mean"] = "zero") -> Tensor:
        """[layers, heads]: how much the loss grows when one head is ablated."""
        if instead not in ("zero", "mean"):
            raise ValueError(f"instead={instead!r}: a head's output is ablated to zero or to its mean")
        whole, means = self.losses(), self.means()
        rows = []
        for layer, own in enumerate(means):
            values: list[Tensor | None] = list(own) if instead == "mean" else [None] * len(own)
            grown = [self.losses({(layer, head): value}) - whole for head, value in enumerate(values)]
            rows.append(torch.tensor(grown, dtype=torch.float64))
        return even(rows)

    def losses(self, heads: dict[Head, Tensor | None] | None = None) -> float:
        """The mean loss with these heads' outputs [e] in place of theirs; None: zeros."""
        with torch.no_grad(), still(self.subject.model), self.changed(heads or {}):
            return sum(float(self._loss(sample)) for sample in self.samples) / len(self.samples)

    def means(self) -> list[Tensor]:
        """Each layer's heads' outputs, the mean over all samples and tokens, [heads, e]."""
        sums: dict[int, Tensor] = {}
        total: dict[int, int] = {}

        def read(call: Any) -> None:
            opened(call, "importance")
            sums[call.layer] = sums.get(call.layer, 0) + call.output[0].double().sum(1)
            total[call.layer] = total.get(call.layer, 0) + call.output.shape[2]

        with torch.no_grad(), still(self.subject.model), tap(self.subject.model, read, **self._where):
            for sample in self.samples:
                self.subject.feed(sample.named)
        return [sums[layer] / total[layer] for layer in sorted(sums)]

    @contextmanager
    def changed(self, heads: dict[Head, Tensor | None]) -> Iterator[None]:
        by_layer: dict[int, dict[int, Tensor | None]] = {}
        for (layer, head), value in heads.items():
            by_layer.setdefault(layer, {})[head] = value

        def read(call: Any) -> Tensor:
            opened(call, "importance")
            own, output = by_layer[call.layer], call.output.clone()
            for head, value in own.items():
                call.check_heads([head])
                output[:, head] = 0.0 if value is None else value.to(output.dtype)
            return output

        with ExitStack() as stack:
            if by_layer:
                stack.enter_context(tap(self.subject.model, read, layers=sorted(by_layer), **self._where))
            yield

    # -- pruning ---------------------------------------------------------------------------------------------------

    def prune(
        self, by: Literal["gradient", "loss"] = "gradient", *, steps: int | None = None, at_once: float = 0.0
    ) -> Pruning:
        """Takes away the least important head again and again, until none is left or for so many steps.

        by: "gradient" (I, measured anew with what was pruned) or "loss" (the head whose ablation costs least, which
        takes a pass for every head that is left). at_once: the share of all heads that one step takes, at least one.
        """
        if by not in ("gradient", "loss") or not 0 <= at_once <= 1:
            raise ValueError(f"by={by!r}, at_once={at_once}: prune by gradient or loss, a share of 0 to 1 at once")
        left = [(layer, head) for layer, own in enumerate(self.means()) for head in range(len(own))]
        each = max(1, round(at_once * len(left)))
        count = math.ceil(len(left) / each) if steps is None else steps
        order: list[Head] = []
        losses = [self.losses()]
        for _ in range(count):
            if not left:
                break
            taken = self._weakest(left, order, by)[:each]
            order += taken
            left = [head for head in left if head not in set(taken)]
            losses.append(self.losses(dict.fromkeys(order)))
        return Pruning(order, losses, each)

    def _weakest(self, left: list[Head], order: list[Head], by: str) -> list[Head]:
        if by == "gradient":
            found = self.gradient(order)
            return sorted(left, key=lambda head: float(found[head]))
        return sorted(left, key=lambda head: self.losses(dict.fromkeys([*order, head])))

    def _loss(self, sample: Sample) -> Tensor:
        assert self.loss is not None
        found = self.loss(self.subject.whole(sample.named), sample.named)
        if found.numel() != 1 or not bool(found.isfinite()):
            raise ValueError(f"the loss must be one finite number for each sample; it gave {found.detach()}")
        return found.reshape(())

    @property
    def _where(self) -> dict[str, Any]:
        return {"stack": self.subject.stack, "kind": "self"}


@dataclass(frozen=True)
class Pruning:
    """order: heads as they were taken away, the least important first. losses: before the first and after every step
    of `each` heads."""

    order: list[Head]
    losses: list[float]
    each: int = 1

    def ranks(self, layers: int, heads: int) -> Tensor:
        """[layers, heads]: 0 for the first that was pruned to 1 for the last; 1 too for what was left."""
        found = torch.ones(layers, heads)
        last = max(1, layers * heads - 1)
        for place, (layer, head) in enumerate(self.order):
            found[layer, head] = place / last
        return found
