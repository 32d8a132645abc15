"""Every touch of transformers' internals (5.16 to 5.23): one attention function and one mask function under one name.

The mask function gives a description of what may be seen instead of a tensor, so that a ragged layer can ask about the
tokens that it still holds and nothing of size [n, n] is made. The attention function gets a handle from our cache's
`update` and hands it the queries; where other caches or none are used it gets tensors and computes what they ask for.
Nothing is registered or changed before a policy is first used on a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manyheads.cache_names import given_cache
from manyheads.hosts.attend import Scoring, causal_attention, masked_attention, pack
from manyheads.hosts.configs import LentConfigs
from manyheads.hosts.families import is_own, layer_plans
from manyheads.hosts.visibility import Visibility
from manyheads.hosts.wrappers import untraced

NAME = "manyheads_ragged"


# Arguments of an attention call that change its result and that nothing here computes.
_FOREIGN = ("position_bias", "cache")


class Handle(Protocol):
    """What a ragged layer's `update` gives back in the place of keys and values."""

    def total(self) -> int: ...

    def attend(self, query: Tensor, scoring: Scoring, seen: Visibility) -> Tensor: ...


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visibility:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    rule = mask_function or causal_mask_function
    offset, first = int(q_offset), int(kv_offset)
    if use_vmap or first:
        # A caller's own mask function may be anything but index arithmetic: let the library make the tensor, all of it.
        made = sdpa_mask(
            batch_size, q_length, kv_length, q_offset=offset, kv_offset=first, mask_function=rule,
            attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        made = nn.functional.pad(made, (first, 0))
        return Visibility(None, None, offset, plain=False, tensor=made)
    padding = None
    if attention_mask is not None:
        missing = max(0, kv_length - attention_mask.shape[-1])
        padding = nn.functional.pad(attention_mask[:, :kv_length].to(torch.bool), (0, missing), value=False)
        padding = None if bool(padding.all()) else padding
    plain = allow_is_causal_skip and (local_size is not None or rule is causal_mask_function)
    return Visibility(rule, padding, offset, window=local_size, plain=plain, rows=torch.arange(batch_size))


def as_visibility(mask: Any, total: int, queries: int, window: int | None) -> Visibility:
    """What a model passed on: our description, a tensor that its caller made, or nothing (then: causal)."""
    if isinstance(mask, Visibility):
        return mask
    if mask is None:
        return Visibility(None, None, total - queries, window=window)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        if mask.shape[-1] < total or mask.shape[-2] != queries:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} does not cover {queries} queries on {total} tokens seen; "
                "give [batch, tokens seen], or [batch, 1 or heads, queries, tokens seen]"
            )
        return Visibility(None, None, total - queries, plain=False, tensor=mask)
    raise ValueError(
        f"attention_mask of type {type(mask).__name__} is not supported by a shrunk cache; give a 2-D mask"
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name in _FOREIGN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name}, which a shrunk cache does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scoring = Scoring(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if isinstance(key, Tensor):
        return on_tensors(module, query, key, value, attention_mask, dropout, scoring, kwargs), None
    if dropout:
        raise ValueError("attention dropout with a shrunk cache: call model.eval() first")
    handle: Handle = key
    seen = attention_mask
    if not isinstance(seen, Visibility):
        seen = as_visibility(seen, handle.total(), query.shape[2], kwargs.get("sliding_window"))
    return handle.attend(query, scoring, seen), None


def on_tensors(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout: float,
    scoring: Scoring,
    kwargs: dict[str, Any],
) -> Tensor:
    """No cache of ours: what the library's own function would have given."""
    n, m = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and not causal:
        mask = torch.ones((1, 1, n, m), dtype=torch.bool, device=query.device)
    seen = as_visibility(mask, m, n, kwargs.get("sliding_window"))
    # Another cache's window holds the latest tokens alone; a caller's own mask counts keys from the first.
    first = seen.tensor.shape[-1] - m if isinstance(mask, Visibility) and seen.tensor is not None else 0
    slots = torch.arange(first, first + m, device=query.device)[None, None]
    if dropout:
        from torch.nn.functional import scaled_dot_product_attention

        if not scoring.plain:
            raise ValueError("attention dropout with soft caps or sinks: train outside the policy")
        out = scaled_dot_product_attention(
            query, key, value, seen.allowed(slice(0, n), slots), dropout, scale=scoring.scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()
    queries = pack(query, key.shape[1])
    if n == m and scoring.plain and seen.only_causal(m):
        out = causal_attention(queries, key, value, scoring.scale)
    else:
        out = masked_attention(queries, key, value, scoring, lambda rows: seen.allowed(rows, slots))
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def register() -> None:
    """Makes the two functions known to transformers, under our own name; harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, describe_mask)


# Where an attached model keeps its own configs and the hook that tells caches of a call: on the model itself, so that
# a deep copy of it can be released too.
_LENT = "_manyheads_lent"


def is_attached(model: Any) -> bool:
    if is_own(model):
        return _LENT in vars(model)
    return getattr(model.config, "_attn_implementation", None) == NAME


def _announce(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(
            f"output_attentions=True: {type(module).__name__} attends through a shrunk cache, which makes no matrix of "
            "weights to give; ask outside the policy's block, after release(model), or use manyheads explain"
        )
    begin = getattr(given_cache(kwargs), "begin", None)
    if begin is not None:
        told = {name: kwargs.get(name) for name in ("use_cache", "logits_to_keep", "position_ids", "input_ids")}
        if args:
            told["input_ids"] = args[0]
        begin(module, **told)


def attach(model: Any) -> None:
    """Lets the model attend through ragged layers. Configs are copied first: several models may share one."""
    if is_attached(model):
        return
    layer_plans(model)
    # Our own models' layers ask the cache that they are given, whatever the configuration says.
    own = is_own(model)
    lent = None if own else LentConfigs(model.modules())
    hook = model.register_forward_pre_hook(untraced(model, _announce), with_kwargs=True)
    setattr(model, _LENT, (lent, hook))
    if lent is None:
        return
    register()
    try:
        model.set_attn_implementation(NAME)
        lent.note()
    except BaseException:
        detach(model)
        raise


def detach(model: Any) -> None:
    """Gives the model its own configs back, and with them its own attention."""
    if _LENT not in vars(model):
        return
    lent, hook = vars(model).pop(_LENT)
    hook.remove()
    if lent is not None:
        lent.give_back()
