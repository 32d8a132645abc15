"""An intervention and what it changes: the answer before and after, and which tokens count for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.explain.encoded import encoded
from manyheads.explain.explanation import Progress, _answer, _target, speaks
from manyheads.hosts.loading import Loaded
from manyheads.hosts.sites import text_stack
from manyheads.steer import boost, calibrate, perturb, scaled

# What is measured must run the changed model: weights that are read off a tap do not see the change of their own layer.
MEASURES = ("leave-one-out", "input-gradient", "integrated-gradients", "saliency")
# Leaving one out runs the model once per token.
MOST_LEFT_OUT = 512
SHOWN = 8
Heads = Sequence[tuple[int, int]]
# Model, factor, span, heads, and the stack of the model whose heads they are.
Apply = Callable[[Any, float, tuple[int, int] | None, Heads | None, str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Kind:
    """needs: "span", "heads", or "" where heads may be chosen, all of them otherwise."""

    name: str
    title: str
    says: str
    label: str
    low: float
    high: float
    neutral: float
    start: float
    needs: str
    apply: Apply

    def told(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "apply"}


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "boost", "Boost a span", "Every chosen head attends more (or, below 1, less) to the span; 0 hides it.",
            "Factor", 0, 20, 1, 5, "span",
            lambda m, x, span, heads, stack: boost(m, slice(*(span or (0, 0))), x, heads=heads, stack=stack),
        ),
        Kind(
            "scale", "Scale heads", "The output of the chosen heads is multiplied; 0 silences them.",
            "Factor", -2, 5, 1, 0, "heads",
            lambda m, x, span, heads, stack: scaled(m, dict.fromkeys(heads or (), x), stack=stack),
        ),
        Kind(
            "perturb", "Perturb heads", "The chosen heads look at themselves instead: 0 not at all, 1 only.",
            "Amount", 0, 1, 0, 1, "", lambda m, x, span, heads, stack: perturb(m, x, heads=heads, stack=stack),
        ),
        Kind(
            "calibrate", "Calibrate sinks", "Sinks after the first keep this share of their attention; "
            "the other tokens get the rest.",
            "Share", 0, 1, 1, 0.4, "", lambda m, x, span, heads, stack: calibrate(m, x, heads=heads, stack=stack),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    kind: str
    factor: float
    span: tuple[int, int] | None = None
    heads: Heads | None = None

    def on(self, model: Any, length: int) -> AbstractContextManager[None]:
        """The open intervention. ValueError where it does not fit the kind, or the text."""
        kind = KINDS[self.kind]
        if not kind.low <= self.factor <= kind.high:
            raise ValueError(f"{kind.title}: {kind.label.lower()} must lie between {kind.low:g} and {kind.high:g}")
        if kind.needs == "heads" and not self.heads:
            raise ValueError(f"{kind.title}: choose at least one head")
        if kind.needs == "span":
            if self.span is None:
                raise ValueError(f"{kind.title}: choose the tokens of the span")
            if not 0 <= self.span[0] < self.span[1] <= length:
                raise ValueError(f"{kind.title}: the span {list(self.span)} does not lie in the text's {length} tokens")
        return kind.apply(model, self.factor, self.span, self.heads or None, text_stack(model))


def intervene(
    loaded: Loaded,
    text: str,
    change: Change,
    *,
    target: str | None = None,
    measure: str = "leave-one-out",
    progress: Progress = lambda what, share: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is told of the change, and values [n] per token before, after and their difference.

    The target of both values is the one of the model as it is: the text's first token, or its own answer. ValueError as
    in `explain_text`, and where the change does not fit the model or the text.
    """
    model = loaded.model
    inputs, tokens = encoded(loaded, text)
    if measure == "leave-one-out" and len(tokens) > MOST_LEFT_OUT:
        raise ValueError(f"leave-one-out runs once per token; above {MOST_LEFT_OUT} choose input-gradient")
    progress(f"reading {len(tokens)} tokens", 0.0)
    before = _output(model, inputs)
    chosen = _target(loaded, target, _answer(loaded, before))
    if chosen is None:
        raise ValueError(f"{loaded.name} only encodes: it gives no answer that could change")
    progress("attribution before", 0.1)
    values = {"before": _values(model, inputs, chosen, measure)}
    progress("with the intervention", 0.5)
    with change.on(model, len(tokens)):
        after = _output(model, inputs)
        _answer(loaded, after)  # refuses NaN
        progress("attribution after", 0.6)
        values["after"] = _values(model, inputs, chosen, measure)
    shown = {"change": values["after"] - values["before"], **values}
    told: dict[str, Any] = {"target": _name(loaded, chosen), "answers": _answers(loaded, before, after, chosen)}
    p, q = (_shares(output) for output in (before, after))
    told["moved"] = round(float((p - q).abs().sum() / 2), 6)
    told["same"] = bool(torch.equal(p, q))
    return told, shown


@torch.no_grad()
def _output(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model(**inputs)


def _shares(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return (logits[0, -1] if logits.dim() == 3 else logits[0]).double().softmax(-1)


def _answers(loaded: Loaded, before: Any, after: Any, target: int) -> list[dict[str, Any]]:
    """The likeliest of both runs and the target, by the probability that they had."""
    p, q = _shares(before), _shares(after)
    places = {target, *(int(i) for own in (p, q) for i in own.topk(min(SHOWN, own.numel())).indices)}
    rows = sorted(places, key=lambda i: (-float(p[i]), i))
    return [
        {"id": i, "name": _name(loaded, i), "before": round(float(p[i]), 6), "after": round(float(q[i]), 6)}
        for i in rows
    ]


def _name(loaded: Loaded, index: int) -> str:
    if speaks(loaded.model):
        return loaded.tokens([index])[0]
    names = getattr(loaded.model.config, "id2label", None) or {}
    return str(names.get(index, index))


def _values(model: Any, inputs: dict[str, Tensor], target: int, measure: str) -> Tensor:
    from manyheads.explain.attributions import METHODS, leave_one_out

    if measure == "leave-one-out":
        return leave_one_out(model, inputs, target)[0]
    found = METHODS[measure](model, None).attribute(inputs, target)
    if isinstance(found, dict):
        raise ValueError("interventions are shown for models with one stream of tokens")
    return found[0]
