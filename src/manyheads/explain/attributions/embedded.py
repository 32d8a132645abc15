"""Vectors in the place of those that a model looks up for its token ids.

Handing a model inputs_embeds instead of ids is not the same: some scale what they look up, some find the last token or
the positions from ids, some look up more than one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.switching import uncompiled

NAMES = ("input_ids", "decoder_input_ids")


def embeddings_of(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vectors [b, n, e] of the token ids among the inputs by name, as the model looks them up."""
    ids = {name: named[name] for name in NAMES if named.get(name) is not None}
    if not ids:
        return {}
    with torch.no_grad():
        return {name: _table(model)(own) for name, own in ids.items()}


@contextmanager
def embedded(model: nn.Module, named: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, these vectors are what a pass of the model finds for its token ids of that name. ValueError where it
    looks them up nowhere, or not as its table has them."""
    own, depth, found = _table(model), 0, list[str]()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal depth
        depth -= 1
        # An adapter's table holds the one that it adapts.
        if depth or not args or not isinstance(args[0], Tensor) or args[0].is_floating_point():
            return output
        read = [name for name in vectors if torch.equal(args[0], named[name])]
        if not read:
            return output
        if module is not own and not torch.equal(_forward(args[0]), output):
            raise ValueError(f"{type(model).__name__} has several tables of tokens: give inputs_embeds instead of ids")
        # An encoder and a decoder that read the same ids are told apart by their order.
        found.append(next((name for name in read if name not in found), read[-1]))
        return vectors[found[-1]].to(output.dtype, copy=True)  # some models write into what they looked up

    def _forward(ids: Tensor) -> Tensor:
        nonlocal depth
        depth += 1
        with torch.no_grad():
            looked: Tensor = own(ids)
        depth -= 1
        return looked

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for table in _alike(model, own):
            stack.callback(table.register_forward_pre_hook(enter).remove)
            stack.callback(table.register_forward_hook(leave).remove)
        yield
    missing = [name for name in vectors if name not in found]
    if missing:
        raise ValueError(f"{type(model).__name__} does not look up its {missing[0]} as they are: give inputs_embeds")


def _table(model: Any) -> nn.Module:
    own = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(own, nn.Module):
        raise ValueError(f"{type(model).__name__} has no get_input_embeddings(): vectors of its token ids are needed")
    return own


def _alike(model: nn.Module, own: nn.Module) -> list[nn.Module]:
    """The table, and those that share its weight: an encoder and a decoder may have one each."""
    weight = getattr(own, "weight", None)
    shared = [each for each in model.modules() if weight is not None and each._parameters.get("weight") is weight]
    return list(dict.fromkeys([own, *shared]))
