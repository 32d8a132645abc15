"""How much each head of a checkpoint matters, from text: rows x of tokens, loss L the mean negative log-likelihood of
the next token, g_h what head h's output is multiplied by before o_proj.

    importance   mean over rows of |dL / dg_h| at g = 1
    normalised   the same, divided by its l2 norm over the heads of the layer
    ablation     mean over rows of L with g_h = 0, less L
    alone        mean over rows of L, less L with g = 0 for all other heads of the layer (all but one ablated)
    greedy       when it goes, if one head after the other goes, each time the one without which L is least
    random       by a seed, to compare with

Source: Michel et al., Are Sixteen Heads Really Better than One?, arXiv:1905.10650: gradients of gates, normalised by
layer (after Molchanov et al.) and without; one head ablated, and all but one of a layer. The absolute value is taken
for every row, as a mean inside it would cancel signs. Their iterative pruning estimates importance once and removes a
tenth at a time, which ends where removing all at once does; `greedy` asks anew after every head, heads^2 / 2 losses a
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.convert.layout import Attention, attentions, in_eval

Rows = Sequence[Sequence[int]]


def head_scores(model: Any, rows: Rows, by: str = "importance", *, seed: int = 0) -> Tensor:
    """[layers, heads], in float64: how much each head matters; greater matters more. rows: of token ids."""
    layers = attentions(model)
    shape = (len(layers), layers[0].heads)
    if by not in MEASURES:
        raise ValueError(f"--by {by!r}: want one of {', '.join(MEASURES)}")
    if by == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()
    if not rows:
        raise ValueError("to know how much heads matter takes calibration text: rows of token ids")
    gates = torch.ones(shape, device=model.device, dtype=model.dtype)
    with in_eval(model):
        return _SCORES[by](model, rows, gates).cpu()


def _by_gradient(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    gates.requires_grad_()
    total = torch.zeros(gates.shape, dtype=torch.float64, device=gates.device)
    with gated(model, gates), torch.enable_grad():
        for row in rows:
            (gradient,) = torch.autograd.grad(_loss(model, row), gates)
            total += gradient.double().abs()
    return total / len(rows)


def _normalised(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    # A layer whose heads all do nothing has norm zero, and stays at zero.
    return nn.functional.normalize(_by_gradient(model, rows, gates), dim=1)


def _by_ablation(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    def without(layer: int, head: int) -> None:
        gates[layer, head] = 0.0

    return _difference(model, rows, gates, without)


def _alone(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    def only(layer: int, head: int) -> None:
        gates[layer] = 0.0
        gates[layer, head] = 1.0

    return -_difference(model, rows, gates, only)


@torch.no_grad()
def _difference(model: Any, rows: Rows, gates: Tensor, close: Callable[[int, int], None]) -> Tensor:
    """The rise of the loss, for every head, once `close` has closed gates for it."""
    total = torch.zeros(gates.shape, dtype=torch.float64, device=gates.device)
    with gated(model, gates):
        for row in rows:
            whole = float(_loss(model, row))
            for layer, head in _places(gates):
                close(layer, head)
                total[layer, head] += float(_loss(model, row)) - whole
                gates[layer] = 1.0
    return total / len(rows)


@torch.no_grad()
def _greedy(model: Any, rows: Rows, gates: Tensor) -> Tensor:
    order = torch.zeros(gates.shape, dtype=torch.float64, device=gates.device)
    left = _places(gates)
    with gated(model, gates):
        for turn in range(len(left)):
            losses = []
            for place in left:
                gates[place] = 0.0
                losses.append(sum(float(_loss(model, row)) for row in rows))
                gates[place] = 1.0
            gone = left.pop(losses.index(min(losses)))
            gates[gone], order[gone] = 0.0, turn
    return order


_SCORES: Mapping[str, Callable[[Any, Rows, Tensor], Tensor]] = {
    "importance": _by_gradient,
    "normalised": _normalised,
    "ablation": _by_ablation,
    "alone": _alone,
    "greedy": _greedy,
}
MEASURES = (*_SCORES, "random")


def _places(gates: Tensor) -> list[tuple[int, int]]:
    layers, heads = gates.shape
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def _loss(model: Any, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(row)], device=model.device)
    logits = model(ids, use_cache=False).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, ids[0, 1:])


@contextmanager
def gated(model: Any, gates: Tensor) -> Iterator[None]:
    """Every head's output is multiplied by its gate, [layers, heads]."""

    def gate(place: int, layer: Attention) -> Callable[[Any, Any], Any]:
        def hook(module: Any, args: Any) -> Any:
            mixed = args[0].unflatten(-1, (layer.heads, layer.head_dim))
            return ((mixed * gates[place][:, None]).flatten(-2),)

        return hook

    hooks = [
        layer.module.o_proj.register_forward_pre_hook(gate(place, layer))
        for place, layer in enumerate(attentions(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
