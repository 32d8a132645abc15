"""Feeds a mechanism that is tested or timed what it reads beside x, so that it can be called with x alone.

Side inputs come from the mechanism's own `example_inputs`, edges from here, and maps travel as one tensor [batch, cells
of all maps, features of the widest], which is taken apart in front of the module and put together behind it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism, Result


def example_edges(n: int, device: Any = "cpu") -> Tensor:
    """[2, e] among n nodes: chains, longer ways, a loop, an edge given twice; node 4 has none. The edges among the
    first k of n nodes are those of k nodes, in the same order."""
    pairs = []
    for new in range(n):
        for old in range(new + 1):
            if 4 in (old, new):
                continue
            if old + 1 == new or (7 * old + 3 * new) % 5 == 0:
                pairs += [(old, new)] if old == new else [(old, new), (new, old)]
            if (old, new) == (0, 1):
                pairs.append((old, new))
    return torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).T


def feed(module: Mechanism, pattern: Pattern) -> Mechanism:
    """The module, with hooks that fill in what a call leaves out."""
    if pattern is Pattern.MAPS:
        module.register_forward_pre_hook(_take_apart, with_kwargs=True)
        module.register_forward_hook(_put_together)
    if pattern in module.card.patterns and (pattern is Pattern.GRAPH or module.card.takes):
        module.register_forward_pre_hook(functools.partial(_fill_in, pattern), with_kwargs=True)
    return module


def _fill_in(pattern: Pattern, module: Any, args: Any, kwargs: Any) -> Any:
    x, state = args[0] if args else kwargs.get("x"), kwargs.get("state")
    if not isinstance(x, Tensor) or not _is_plain(x, x.device) or x.ndim not in (3, 4, 5):
        return None
    seen = getattr(state, "length", 0)
    n = seen + x.shape[1:-1].numel()
    if x.ndim != 3 and any(what.startswith("[b, heads, n, m]") for what in module.card.takes.values()):
        return None
    edges = kwargs.get("edges", example_edges(n, x.device) if pattern is Pattern.GRAPH else None)
    if edges is not None and not (isinstance(edges, Tensor) and edges.dtype == torch.int64 and edges.ndim == 2):
        return None
    given = {} if edges is None else {"edges": edges}
    context = args[1] if len(args) > 1 else kwargs.get("context")
    own, more = (module.example_inputs(size, edges) for size in (n, max(n, 16) if edges is None else n))
    for name in own:
        each = module.card.takes[name].startswith("[b, n")
        of_context = module.card.takes[name].startswith("[b, m")
        value = more[name] if each or of_context else own[name]
        value = value.to(x.device, x.dtype) if value.is_floating_point() else value.to(x.device)
        if module.card.takes[name].startswith("[b, heads, n, m]"):
            # Of each query alike for all keys, as those of earlier passes are not at hand.
            value = more[name].to(value)[0, :, _places(x), 0].transpose(0, 1)[..., None].expand(-1, -1, -1, n)
        elif each and edges is None:
            value = value[0, _places(x)]
        elif of_context:
            # No two alike, which a choice of the best could tell apart by chance only.
            if _is_plain(context, x.device) and context.ndim == 3:
                value = value[0, _places(context)] * (1 + context.nan_to_num(0.0, 0.0, 0.0).mean(-1, True).tanh() / 4)
        elif value.shape[0] == 1 and (edges is None or value.ndim > 2):  # not what each edge has
            value = value.expand(x.shape[0], *value.shape[1:])
        given[name] = value
    return args, {**given, **kwargs}


def _is_plain(x: Any, device: torch.device) -> bool:
    """Whether a mechanism computes with it; what it does not is left for it to refuse."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return isinstance(x, Tensor) and x.layout is torch.strided and x.dtype in kinds and x.device == device


def _places(x: Tensor) -> Tensor:
    """[b, n] of 0 to 15, of which the token's own first features tell, so that what goes with it is the same wherever
    it stands: behind padding, in another row, in a second pass."""
    bits = (x[..., :4] > 0).long()
    return (bits * torch.tensor([1, 2, 4, 8], device=x.device)[: bits.shape[-1]]).sum(-1)


def map_sizes(module: Any, cells: int) -> Any:
    """The sizes of the maps that have so many cells in all, or None."""
    for side in range(1, 513):
        sizes = module.map_sizes(side, side + 1)
        if sum(height * width for height, width in sizes) == cells:
            return sizes
    return None


def _take_apart(module: Any, args: Any, kwargs: Any) -> Any:
    x, mask = args[0] if args else kwargs.get("x"), kwargs.get("mask")
    whole = isinstance(x, Tensor) and x.ndim == 3 and x.layout is torch.strided
    sizes = map_sizes(module, x.shape[1]) if whole else None
    if sizes is None:
        return None
    lengths, widths = [h * w for h, w in sizes], module.map_dims or (module.dim,) * len(sizes)
    # A tensor narrower than the widest map is left so, for the mechanism to refuse.
    maps = tuple(
        part.unflatten(1, size)[..., : wide - max(widths) + x.shape[2]]
        for part, size, wide in zip(x.split(lengths, 1), sizes, widths, strict=True)
    )
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == x.shape[1]:
        mask = tuple(part.unflatten(1, size) for part, size in zip(mask.split(lengths, 1), sizes, strict=True))
    if not args:
        return args, {**kwargs, "x": maps, "mask": mask}
    return (maps, *args[1:]), {**kwargs, "mask": mask}


def _put_together(module: Any, args: Any, result: Result) -> Result:
    if isinstance(result.output, Tensor):
        return result
    wide = max(part.shape[-1] for part in result.output)
    parts = [F.pad(part.flatten(1, 2), (0, wide - part.shape[-1])) for part in result.output]
    return result._replace(output=torch.cat(parts, 1))
