"""Attention of diffusers' models, read and changed through their attention processors.

A model of diffusers hands every pass of an attention layer to the layer's processor. While readers are open, the
default one (softmax by PyTorch's kernel) has its place taken by one that makes the same pass from the same parts and
shows the heads' outputs to the readers before they are projected; any other processor is refused, since what it does is
not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyheads.hosts.attend import Scoring
from manyheads.hosts.calls import AttentionCall
from manyheads.hosts.reading import check_run, fitting, readings
from manyheads.hosts.sites import Site

KNOWN = "AttnProcessor2_0"


@contextmanager
def processed(sites: Sequence[Site]) -> Iterator[None]:
    """While open, readers of these sites get their calls. ValueError for a processor that is not the default one."""
    with ExitStack() as stack:
        for site in sites:
            layer: Any = site.module
            own = layer.processor
            if isinstance(own, Tapped):
                continue
            if type(own).__name__ != KNOWN:
                raise ValueError(
                    f"{site.path} attends by {type(own).__name__}, which taps do not know: they read the default "
                    f"{KNOWN}; call set_default_attn_processor() first"
                )
            stack.callback(layer.set_processor, own)
            layer.set_processor(Tapped())
        yield


class Tapped:
    """The default processor's pass, with readers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        check_run(attn)
        shape, residual = hidden_states.shape, hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        x = hidden_states.flatten(2).transpose(1, 2) if len(shape) == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        heads = _heads(attn, x, source, attention_mask)
        out = attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        out = out + residual if attn.residual_connection else out
        changed: Tensor = out / attn.rescale_output_factor
        return changed


def _heads(attn: Any, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """[b, h, n, e], after all readers."""
    query, key, value = (
        own.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for own in (attn.to_q(x), attn.to_k(source), attn.to_v(source))
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, source.shape[1], len(x))
        mask = mask.view(len(x), attn.heads, -1, mask.shape[-1])
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask).to(query.dtype)
    shown = None if mask is None else _plainly(mask).expand(-1, -1, query.shape[2], -1)
    for site, reader, memo in readings(attn):
        call = AttentionCall(site, query, key, value, shown, False, Scoring(query.shape[-1] ** -0.5))
        call.output, call.memo = output, memo
        found = reader(call)
        if found is not None:
            output = fitting(found, output.shape, site)
    return output


def _plainly(mask: Tensor) -> Tensor:
    """An added mask that says "nothing" as other models do: diffusers adds -10000 to scores."""
    return mask.masked_fill(mask < -9000, torch.finfo(mask.dtype).min) if mask.is_floating_point() else mask
