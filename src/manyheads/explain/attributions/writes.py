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
    """Fills `found` from the index of a call to its write, while the model runs and calls come in. The map is the
    outermost module that reads the heads: what an adapter, a quantised weight or a hook does to a Linear belongs to it.
    """
    names = {module: name for name, module in model.named_modules()}
    readers: dict[int, str] = {}
    asking = False

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal asking
        index = len(calls) - 1
        if asking or index < 0 or not isinstance(calls[-1], AttentionCall):
            return
        inner = readers.get(index)
        if not (_linear(module) if inner is None else inner.startswith(names[module] + ".")):
            return
        heads = calls[-1].output.transpose(1, 2).flatten(2)
        if not _reads(args, heads) or not isinstance(output, Tensor) or output.numel() % heads[..., 0].numel():
            return
        readers[index], asking = names[module], True
        try:
            own = _write(module, args[0], output, heads, calls[-1].heads)
        finally:
            asking = False
        if own is None:
            found.pop(index, None)
        else:
            found[index] = own

    def check(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """What a mechanism does to the map's output (a gate, a norm) would not be told."""
        own = found.get(len(calls) - 1)
        if own is not None and calls[-1].site.module is module and not torch.equal(result.output, own.output):
            del found[len(calls) - 1]

    hooks = [
        module.register_forward_hook(check if isinstance(module, Mechanism) else look)
        for module, name in names.items()
        if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _reads(args: tuple[Any, ...], heads: Tensor) -> bool:
    """Whether a module was given these heads, and nothing else."""
    given = args[0] if len(args) == 1 else None
    if not isinstance(given, Tensor) or given.shape[-1] != heads.shape[-1] or given.numel() != heads.numel():
        return False
    return torch.equal(given.reshape(heads.shape), heads)


@torch.no_grad()
def _write(module: nn.Module, given: Tensor, output: Tensor, heads: Tensor, count: int) -> Write | None:
    """The map of a module that was given these heads; None where it is none, as with dropout in it."""
    wrote = output.detach().reshape(*heads.shape[:2], -1)
    if _linear(module) and len(module._forward_hooks) == 1 and not module._forward_pre_hooks:
        flat = module.weight.T if isinstance(module, nn.Linear) else module.weight
        assert isinstance(flat, Tensor)
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        return Write(flat.detach().unflatten(0, (count, -1)), bias, wrote)
    bias = module(torch.zeros_like(given[..., :1, :]))[..., 0, :].flatten(0, -2)[0]
    basis = torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    flat = module(basis if given.dim() == 2 else basis[None]).reshape(len(basis), -1) - bias
    wide = torch.promote_types(flat.dtype, torch.float32)
    again = heads.detach().to(wide) @ flat.to(wide) + bias.to(wide)
    # What rounds to eight bits on the way, weights or numbers, is a linear map but for that.
    rounding = max(1e-3, 4 * torch.finfo(flat.dtype).eps)
    if float((again - wrote).abs().max()) > rounding * float(wrote.abs().max()):
        return None
    return Write(flat.unflatten(0, (count, -1)), bias, wrote)


def _linear(module: nn.Module) -> bool:
    """A Linear of any sort, weight [out, in], or transformers' Conv1D, weight [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def written(call: AttentionCall, write: Write) -> Tensor:
    """What each key would write if a head read it alone: v_j^h W_o^h, [b, h, m, out]."""
    value = call.of_heads(call.value, torch.arange(call.heads, device=call.value.device))
    return value @ write.weight
