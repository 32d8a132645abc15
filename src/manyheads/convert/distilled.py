"""A student of fewer layers, or of another width, made from a model: what a teacher is then given to teach."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.layout import attentions, check_bare

_LAYER = re.compile(r"(model\.(?:stack\.)?layers\.)(\d+)(\..*)")
# Our own model, with any mechanism in its layers, has fewer of them as others have.
_OWN = "manyheads"
# What grows with the width, as it does in every family that is known here.
_WIDE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_student(model: Any, depth: int, width: int | None = None) -> None:
    """ValueError where no such student can be made of the model."""
    check_bare(model)
    most, size = model.config.num_hidden_layers, model.config.hidden_size
    if model.config.model_type != _OWN or width is not None:
        attentions(model)
    if not 1 <= depth <= most:
        raise ValueError(f"--depth {depth}: {type(model).__name__} has {most} layers; want 1 to {most}")
    if width is None:
        return
    wide = [getattr(model.config, key) for key in _WIDE]
    fit = [w for w in range(1, 2 * size + 1) if all(n * w % size == 0 for n in wide)]
    if width not in fit:
        some = ", ".join(map(str, fit[:: max(1, len(fit) // 8)]))
        raise ValueError(f"--width {width}: heads and layers of {type(model).__name__} scale to widths such as {some}")


@torch.no_grad()
def student(model: Any, depth: int, width: int | None = None, *, seed: int = 0) -> Any:
    """A model of the same class with `depth` layers and, where `width` is given, that hidden size; the given one is
    left as it is.

    The student's layer i is the model's layer floor(i L / depth), every other one at half the depth, as in DistilBERT
    (arXiv:1910.01108) and in Efficient Transformer Knowledge Distillation (arXiv:2311.13657); all else is the model's
    own. Another width has weights of its own, drawn anew: heads of the same size, as many fewer as the width is less,
    and the feed-forward alike.
    """
    check_student(model, depth, width)
    old = model.config
    kept = [i * old.num_hidden_layers // depth for i in range(depth)]
    config = copy.deepcopy(old)
    for key, value in vars(old).items():
        if isinstance(value, list) and len(value) == old.num_hidden_layers:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = depth
    if width is not None:
        for key in _WIDE:
            setattr(config, key, getattr(old, key) * width // old.hidden_size)
        config.head_dim = attentions(model)[0].head_dim
    parameter = next(model.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = type(model)._from_config(config, dtype=parameter.dtype)
    if width is None:
        made.load_state_dict(_renumbered(model.state_dict(), kept))
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(parameter.device).eval()


def _renumbered(state: Mapping[str, Tensor], kept: list[int]) -> dict[str, Tensor]:
    """The tensors of the kept layers under their new numbers, and all that belong to no layer."""
    found = {}
    for key, value in state.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            found[key] = value
            continue
        for new in (i for i, at in enumerate(kept) if at == int(match[2])):
            found[f"{match[1]}{new}{match[3]}"] = value
    return found
