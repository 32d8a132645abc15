"""DyVTE: all image tokens leave once the text has read them, from a layer that a gate chooses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from manyheads.steer.method import Prompt, steering
from manyheads.steer.thinning.tokens import Step, Thinning, after_image, text_layers, thinned


class ExitGates(nn.Module):
    """After each layer but the last: logits [b, 2] (stay, leave) = W2 gelu(W1 f), f = [mean of the words after the
    image without the last, the last] in R^2D. One pair of matrices without bias per layer; W1 has 2048 rows as in the
    released code, or `hidden`."""

    def __init__(self, dim: int, layers: int, hidden: int = 2048):
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(2 * dim, hidden, bias=False) for _ in range(layers - 1))
        self.out = nn.ModuleList(nn.Linear(hidden, 2, bias=False) for _ in range(layers - 1))

    def forward(self, layer: int, features: Tensor) -> Tensor:
        """Of the gate between layers `layer` and `layer + 1`; features [b, 2D]."""
        logits: Tensor = self.out[layer](gelu(self.into[layer](features)))
        return logits


def gates_for(model: Any, hidden: int = 2048) -> ExitGates:
    """Untrained gates of a model's width and depth, in its type and where it is."""
    config, own = model.config.get_text_config(decoder=True), next(model.parameters())
    return ExitGates(config.hidden_size, len(text_layers(model)), hidden).to(own.device, own.dtype)


def features(step: Step, words: Tensor | None = None) -> Tensor:
    """f [b, 2D] of the words after the image, or of the `words` [b, q]; zeros where a row has none. A single word is
    its own mean."""
    words = after_image(step) if words is None else words
    order = torch.arange(words.shape[1], device=words.device)
    last = torch.where(words, order, -1).amax(1)
    final = (order == last[:, None]) & words
    rest = torch.where(words.sum(1, keepdim=True) > 1, words & ~final, words).to(step.states.dtype)
    mean = (rest[..., None] * step.states).sum(1) / rest.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([mean, (final[..., None] * step.states).sum(1)], -1)


@contextmanager
def visual_exit(model: nn.Module, gates: ExitGates | None = None, layer: int | None = None) -> Iterator[Thinning]:
    """Claim: the text reads the image in the lower layers; from some layer on image tokens are carried for nothing.

    After layer l the gate reads the words after the image (`ExitGates`); at the first layer where its second logit is
    the greater, all image tokens of that row leave, for the whole generation. Words keep their positions; each layer's
    cache holds what it saw. layer: instead of gates, all leave before that one. With neither nothing leaves. Rows of a
    batch leave on their own; a row without words after its image keeps its tokens.
    Source: arXiv 2411.19628, DoubtedSteam/DyVTE, which is written for one row and an image at a fixed place; the gate
    after the last layer, which could save nothing, is left out here.
    """
    depth = len(text_layers(model))
    if gates is not None and layer is not None:
        raise ValueError("visual_exit: gates choose the layer, or `layer` says it; give one of the two")
    if gates is not None and len(gates.into) != depth - 1:
        raise ValueError(f"visual_exit: gates of {len(gates.into) + 1} layers for a model of {depth}")
    if layer is not None and layer < 1:
        raise ValueError(f"visual_exit: image tokens can leave before layer 1 at the earliest; got {layer}")

    def rule(step: Step) -> Tensor | None:
        if not step.layer or (gates is None and step.layer != layer):
            return None
        if gates is None:
            return ~step.image
        with torch.no_grad():
            logits = gates(step.layer - 1, features(step))
        leaves: Tensor = (logits[:, 1] > logits[:, 0]) & after_image(step).any(1)
        return ~(step.image & leaves[:, None])

    with thinned(model, rule) as thinning:
        yield thinning


def fit_exits(
    model: Any,
    gates: ExitGates,
    batches: Iterable[dict[str, Tensor]],
    *,
    learning_rate: float = 1e-3,
    agreement: float = 0.99,
    tolerance: float = 1.03,
    seed: int = 0,
) -> list[tuple[int, float, float]]:
    """Trains the gates alone, one step per batch; gives (layer, share of rows that could leave, loss) of each.

    Per step one layer l, drawn evenly; each batch is run whole and with its image tokens gone after l. A row's label is
    "leave" where the greatest logits agree on more than `agreement` of its answer's tokens and its loss is less than
    `tolerance` times that of the whole run; cross entropy of gate l, whose features are of the question's words only.
    batches: the model's inputs with labels [b, n], -100 where there is no answer. The model's own weights stay.
    """
    drawn, optimiser = torch.Generator().manual_seed(seed), torch.optim.Adam(gates.parameters(), lr=learning_rate)
    history = []
    for batch in batches:
        layer = int(torch.randint(len(gates.into), (1,), generator=drawn))
        inputs = {name: own for name, own in batch.items() if name != "labels"}
        found, target = _trial(model, inputs, batch["labels"], layer, agreement, tolerance)
        optimiser.zero_grad()
        loss = cross_entropy(gates(layer, found).float(), target)
        loss.backward()
        optimiser.step()
        history.append((layer, float(target.float().mean()), float(loss.detach())))
    return history


@torch.no_grad()
def _trial(
    model: Any, inputs: dict[str, Tensor], labels: Tensor, layer: int, agreement: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The features [b, 2D] of gate `layer`, and what it should say [b]."""
    answered = labels != -100
    if not bool(answered.any(1).all()):
        raise ValueError("fit_exits: every row needs an answer: labels that are not -100")
    before = answered.long().cumsum(1) == 0
    kept: list[Tensor] = []

    def rule(step: Step) -> Tensor | None:
        if step.layer != layer + 1:
            return None
        kept.append(features(step, after_image(step) & before.gather(1, step.places)))
        return ~step.image

    whole = model(**inputs, use_cache=False).logits
    with thinned(model, rule):
        less = model(**inputs, use_cache=False).logits
    told, after = answered[:, 1:], labels[:, 1:].clamp_min(0)
    count = told.sum(1)
    same = ((whole[:, :-1].argmax(-1) == less[:, :-1].argmax(-1)) & told).sum(1) / count
    losses = [
        -(logits[:, :-1].float().log_softmax(-1).gather(2, after[..., None])[..., 0] * told).sum(1) / count
        for logits in (whole, less)
    ]
    return kept[0], ((same > agreement) & (losses[1] < tolerance * losses[0])).long()


@steering(
    "visual_exit",
    title="all image tokens leave from a layer on (DyVTE)",
    source="arXiv 2411.19628",
    kinds=("vision-language",),
    neutral={"layer": 0},
    strength="layer",
    reach=(0, 4),
)
def _open(
    model: nn.Module, prompt: Prompt, *, layer: int | None = None, gates: str = ""
) -> AbstractContextManager[Thinning]:
    """layer: all leave before that one, 0: before none. gates: a safetensors file of trained `ExitGates`, which choose
    the layer, as in the paper. There are none in the package."""
    depth = len(text_layers(model))
    if layer is None and not gates:
        raise ValueError(
            f"visual_exit needs a layer that image tokens leave before, visual_exit[layer={max(1, depth // 2)}], or "
            "trained gates, visual_exit[gates=FILE] (thinning.exit.fit_exits trains them)"
        )
    if layer is not None and not 0 <= layer < depth:
        raise ValueError(f"visual_exit: layer={layer}: the model has layers 0 to {depth - 1}; 0 lets no token leave")
    if not gates:
        return visual_exit(model, None, layer or None)
    from safetensors.torch import load_file

    weights = load_file(gates)
    made = gates_for(model, len(weights["into.0.weight"]))
    made.load_state_dict(weights)
    return visual_exit(model, made, layer or None)
