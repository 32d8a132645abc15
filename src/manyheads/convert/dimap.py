"""DIMAP: which weights, or heads, of a hierarchical vision transformer matter, from the weights alone.

Stages of a hierarchical transformer have weights of different sizes, so that one threshold on magnitudes would empty
some blocks. Within a module m, with weights in falling order of magnitude W_1, W_2, ..,

    Imp(W_j) = W_j^2 / sum over i <= j of W_i^2

is the share of what is left of the module that goes with weight j, when all smaller ones are gone already: comparable
between modules, whatever their scale; the largest of each scores 1. One threshold over all modules then says what goes.
Modules are those of every block: queries, keys and values; the projection after them; the MLP. Patches, merging, norms
and classifier are left whole.

For whole heads the same equation runs over the heads of a block, with |W_h|^2 over a head's rows of queries, keys and
values and its columns of the projection in place of W^2; as the largest scores 1, every block keeps one.

Source: He and Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision Transformers, arXiv:2404.13648 (no
code was released). The equation is theirs; that modules end with their block, and the form over heads, are our reading.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.hierarchical import blocks, layout, linear

STRUCTURES = ("weights", "heads")


def distortion(squares: Tensor) -> Tensor:
    """[n] squares -> [n] scores: each as a share of itself and all larger ones. Of equal ones the first is the larger;
    the largest scores 1 even where all are zero, and what is zero beside it 0."""
    order = squares.argsort(descending=True, stable=True)
    falling = squares[order].double()
    scores = torch.zeros_like(falling)
    scores[order] = falling / falling.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    scores[order[:1]] = 1.0
    return scores


@torch.no_grad()
def weight_scores(model: Any) -> dict[str, Tensor]:
    """The score of every weight that may go, by the name of its parameter and in its shape."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for block in blocks(model):
        for module in layout(model).modules:
            weights = [block.get_submodule(path).weight for path in module]
            scores = distortion(torch.cat([w.double().square().flatten() for w in weights]))
            for weight, own in zip(weights, scores.split([w.numel() for w in weights]), strict=True):
                found[names[id(weight)]] = own.view_as(weight)
    return found


@torch.no_grad()
def block_head_scores(model: Any) -> list[Tensor]:
    """Per block [heads]."""
    found, own = [], layout(model)
    for block in blocks(model):
        attention = block.get_submodule(own.attention)
        rows = [attention.get_submodule(name).weight.double().square().sum(1) for name in own.inputs]
        each = torch.stack([*rows, block.get_submodule(own.joined).weight.double().square().sum(0)]).sum(0)
        found.append(distortion(each.view(attention.num_attention_heads, getattr(attention, own.size)).sum(1)))
    return found


def dimap(model: Any, share: float, *, structure: str = "weights") -> Any:
    """A copy without the `share` of weights, or of heads, that matter least. No data is asked for.

    structure: `weights` are set to zero, in the same class and shape. `heads` are gone from the weights, and blocks
    have different numbers of them, which no config of Swin says: save with `save_pretrained`, load with `load_dimap`.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure!r}: want {' or '.join(STRUCTURES)}")
    if isinstance(share, bool) or not 0 <= share < 1:
        raise ValueError(f"share={share!r}: want a number from 0 up to, but not, 1")
    made = copy.deepcopy(model)
    return _without_weights(made, share) if structure == "weights" else _without_heads(made, share)


@torch.no_grad()
def _without_weights(model: Any, share: float) -> Any:
    scores = weight_scores(model)
    gone = _least(list(scores.values()), share)
    for name, lost in zip(scores, gone, strict=True):
        model.get_parameter(name).masked_fill_(lost, 0.0)
    return model


def _without_heads(model: Any, share: float) -> Any:
    kept = kept_heads(model, share)
    _cut(model, kept)
    model.config.heads_kept = [len(row) for row in kept]
    return model


def kept_heads(model: Any, share: float) -> list[list[int]]:
    """Of every block, the heads that stay when a share of all goes."""
    scores = block_head_scores(model)
    count, least = sum(map(len, scores)), len(scores)
    if round(share * count) > count - least:
        raise ValueError(
            f"share={share}: {round(share * count)} of {count} heads in {least} blocks, each of which keeps one; want "
            f"{(count - least) / count:.3f} at most"
        )
    return [[h for h, lost in enumerate(row.tolist()) if not lost] for row in _least(scores, share)]


def _least(scores: list[Tensor], share: float) -> list[Tensor]:
    """Whether each is among the lowest over all, in the shapes given."""
    flat = torch.cat([one.flatten() for one in scores])
    lost = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    lost[flat.argsort(stable=True)[: round(share * len(flat))]] = True
    return [part.view_as(one) for part, one in zip(lost.split([s.numel() for s in scores]), scores, strict=True)]


@torch.no_grad()
def _cut(model: Any, kept: list[list[int]]) -> None:
    own = layout(model)
    for block, heads in zip(blocks(model), kept, strict=True):
        attention, joined = (block.get_submodule(path) for path in (own.attention, own.joined))
        size = getattr(attention, own.size)
        index = torch.tensor(heads, device=joined.weight.device)
        rows = (index[:, None] * size + torch.arange(size, device=index.device)).flatten()
        for name in own.inputs:
            old = getattr(attention, name)
            setattr(attention, name, linear(old.weight[rows], None if old.bias is None else old.bias[rows]))
        block.set_submodule(own.joined, linear(joined.weight[:, rows], joined.bias))
        own.cut(attention, index)
        attention.num_attention_heads = len(heads)
        if own.width is not None:
            setattr(attention, own.width, len(rows))


def load_dimap(folder: str | Path) -> Any:
    """What `save_pretrained` wrote of a model whose heads are gone: its class, with fewer heads in its blocks."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    counts = getattr(config, "heads_kept", None)
    if counts is None:
        raise ValueError(
            f"{folder} holds no model with fewer heads (its config has no heads_kept): use from_pretrained"
        )
    cls = getattr(transformers, config.architectures[0])

    def shaped(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        _cut(self, [list(range(count)) for count in counts])

    # Weights are read, and their names translated, by from_pretrained, which builds the model itself.
    builder: Any = type(cls.__name__, (cls,), {"__init__": shaped, "__module__": cls.__module__})
    made = builder.from_pretrained(folder)
    made.__class__ = cls
    return made.eval()
