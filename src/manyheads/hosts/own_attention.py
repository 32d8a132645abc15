"""Models that attend by code of their own, without transformers' attention interface: LXMERT.

Its attention layers give the heads' outputs side by side, so that a hook reads and changes them; queries, keys and
values are made again from what the layer was given. The cross attention of a layer is one module for both directions:
language reads vision, then vision language. A site of such a module says which of its calls it is (`turn`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.attend import Scoring
from manyheads.hosts.calls import AttentionCall
from manyheads.hosts.reading import check_run, fitting, readings
from manyheads.hosts.sites import Site


@contextmanager
def heard(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """While open, readers of these sites get their calls."""
    with ExitStack() as stack:
        for site in {site.module: site for site in sites}.values():
            ear = _Ear()
            layer = model.get_submodule(site.path.rpartition(".")[0].rpartition(".")[0])
            stack.callback(layer.register_forward_pre_hook(ear.begin).remove)
            stack.callback(site.module.register_forward_hook(ear.after, with_kwargs=True).remove)
        yield


class _Ear:
    """Counts a module's calls within its layer, and reads each."""

    def __init__(self) -> None:
        self.made = 0

    def begin(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.made = 0

    def after(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        turn = self.made
        self.made += 1
        check_run(module)
        heads = output[0].unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for site, reader, memo in readings(module):
            if site.turn != turn:
                continue
            call = _call(site, args, kwargs)
            call.output, call.memo = heads, memo
            call.dropout = module.dropout.p if module.training else 0.0
            changed = reader(call)
            if changed is not None:
                heads = fitting(changed, heads.shape, site)
        return (heads.transpose(1, 2).flatten(2), *output[1:])


def _call(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    module: Any = site.module
    named = {**dict(zip(("hidden_states", "context", "attention_mask"), args, strict=False)), **kwargs}
    size = module.attention_head_size

    def split(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (-1, size)).transpose(1, 2)

    query, context = split(module.query(named["hidden_states"])), named["context"]
    mask = named.get("attention_mask")
    if mask is not None:
        # Added masks say "nothing" with the lowest number of their type.
        mask = (mask > torch.finfo(mask.dtype).min / 2).expand(-1, -1, query.shape[2], -1)
    return AttentionCall(
        site, query, split(module.key(context)), split(module.value(context)), mask, False, Scoring(size**-0.5)
    )
