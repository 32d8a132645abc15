"""The linear map by which an attention call's heads write to the model, found by what it reads, not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.taps import AttentionCall
from manyheads.mechanism import Mechanism


@dataclass(frozen=True)
class Write:
    """weight [h, e, out], bias [out] or None, output [b, n, out] of one call's heads."""

    weight: Tensor
    bias: Tensor | None
    output: Tensor


@contextmanager
def writes(model: nn.Module, calls: list[Any], found: dict[int, Write]) -> Iterator[None]:
    """Fills `found` from the index of a call to its write, while the model runs and calls come in."""

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        index = len(calls) - 1
        if index < 0 or index in found or not isinstance(calls[-1], AttentionCall) or not args:
            return
        heads = calls[-1].output.transpose(1, 2).flatten(2)
        given = args[0]
        if not isinstance(given, Tensor) or given.shape[-1] != heads.shape[-1] or given.numel() != heads.numel():
            return
        if torch.equal(given.reshape(heads.shape), heads):
            flat = module.weight.T if isinstance(module, nn.Linear) else module.weight
            assert isinstance(flat, Tensor)
            weight = flat.detach().unflatten(0, (calls[-1].heads, -1))
            bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
            found[index] = Write(weight, bias, output.reshape(*heads.shape[:2], -1))

    def check(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """What a mechanism does to the map's output (a gate, a norm) would not be told."""
        own = found.get(len(calls) - 1)
        if own is not None and calls[-1].site.module is module and not torch.equal(result.output, own.output):
            del found[len(calls) - 1]

    hooks = [module.register_forward_hook(look) for module in model.modules() if _linear(module)]
    hooks += [module.register_forward_hook(check) for module in model.modules() if isinstance(module, Mechanism)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear(module: nn.Module) -> bool:
    """torch's Linear, weight [out, in], or transformers' Conv1D, weight [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def written(call: AttentionCall, write: Write) -> Tensor:
    """What each key would write if a head read it alone: v_j^h W_o^h, [b, h, m, out]."""
    value = call.of_heads(call.value, torch.arange(call.heads, device=call.value.device))
    return value @ write.weight
