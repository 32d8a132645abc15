"""Every touch of transformers' internals (5.16 to 5.23): one attention function and one mask function under one name.

The mask function gives a description of what may be seen instead of a tensor, so that a ragged layer can ask about the
tokens that it still holds and nothing of size [n, n] is made. The attention function gets a handle from our cache's
`update` and hands it the queries; where other caches or none are used it gets tensors and computes what they ask for.
Nothing is registered or changed before a policy is first used on a model.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manyheads.shrink.attend import Scoring, causal_attention, masked_attention, pack

NAME = "manyheads_ragged"

# Families whose outputs are tested against the dense cache. Others are probed when first used.
TESTED = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "smollm3", "gpt2", "gpt_neox",
    "gpt_oss",
)  # fmt: skip

_WINDOWED = ("sliding_attention",)
_FULL = ("full_attention",)
# Arguments of an attention call that change its result and that nothing here computes.
_FOREIGN = ("position_bias", "cache")


class Handle(Protocol):
    """What a ragged layer's `update` gives back in the place of keys and values."""

    def total(self) -> int: ...

    def attend(self, query: Tensor, scoring: Scoring, seen: Visibility) -> Tensor: ...


@dataclass
class Visibility:
    """What the queries of one pass may see, by slot: the index of a token in everything fed so far, padding included.

    rule(b, h, i, j) is transformers' mask function on slots; padding [b, total] is True at real tokens, None: all are.
    plain: the rule is causal, within `window` where that is given, and nothing else.
    tensor: a mask that the caller made, [b, 1 or h, n, total]; then the rule is not asked.
    """

    rule: Callable[..., Tensor] | None
    padding: Tensor | None
    offset: int
    window: int | None = None
    plain: bool = True
    tensor: Tensor | None = None

    def only_causal(self, tokens: int) -> bool:
        """Whether so many tokens in a row hide nothing from each other but the future."""
        return self.plain and self.padding is None and (self.window is None or tokens <= self.window)

    def allowed(self, rows: slice, slots: Tensor) -> Tensor:
        """[b or 1, g or 1, rows, m] for keys at slots [b or 1, g or 1, m]: bool, or a float mask's own numbers."""
        if self.tensor is not None:
            return self._lookup(rows, slots)
        device = slots.device
        j = slots.unsqueeze(2)
        i = torch.arange(rows.start + self.offset, rows.stop + self.offset, device=device)[None, None, :, None]
        if self.plain:
            allowed = j <= i
            if self.window is not None:
                allowed = allowed & (j > i - self.window)
        else:
            assert self.rule is not None
            b = torch.arange(1 if self.padding is None else self.padding.shape[0], device=device)[:, None, None, None]
            allowed = self.rule(b, torch.zeros_like(b), i, j.clamp_min(0).long())
        if self.padding is not None:
            allowed = allowed & self.real(slots).unsqueeze(2)
        return allowed & (j >= 0)

    def real(self, slots: Tensor) -> Tensor:
        """Whether slots [b or 1, g or 1, m] hold a token that is not padding."""
        if self.padding is None:
            return slots >= 0
        rows, total = self.padding.shape
        inside = slots.clamp(0, total - 1).long().expand(rows, -1, -1)
        found = self.padding.gather(1, inside.flatten(1)).view(inside.shape)
        return found & (slots >= 0) & (slots < total)

    def _lookup(self, rows: slice, slots: Tensor) -> Tensor:
        assert self.tensor is not None
        mask = self.tensor[:, :, rows]
        total = mask.shape[-1]
        b, g = max(mask.shape[0], slots.shape[0]), max(mask.shape[1], slots.shape[1])
        at = slots.clamp(0, total - 1).long().unsqueeze(2).expand(b, g, mask.shape[2], -1)
        found = mask.expand(b, g, -1, -1).gather(3, at)
        outside = ((slots < 0) | (slots >= total)).unsqueeze(2)
        return found.masked_fill(outside, False if found.dtype == torch.bool else torch.finfo(found.dtype).min)


def _describe_mask(
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
    return Visibility(rule, padding, offset, window=local_size, plain=plain)


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
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise ValueError(f"{type(module).__name__} uses {', '.join(foreign)}, which a shrunk cache does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scoring = Scoring(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if isinstance(key, Tensor):
        return _on_tensors(module, query, key, value, attention_mask, dropout, scoring, kwargs), None
    if dropout:
        raise ValueError("attention dropout with a shrunk cache: call model.eval() first")
    handle: Handle = key
    seen = as_visibility(attention_mask, handle.total(), query.shape[2], kwargs.get("sliding_window"))
    return handle.attend(query, scoring, seen), None


def _on_tensors(
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
    slots = torch.arange(m, device=query.device)[None, None]
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


@dataclass(frozen=True)
class LayerPlan:
    """What a model's attention layer asks of its cache."""

    window: int | None


def plan(model: Any) -> list[LayerPlan]:
    """The layers of a causal language model, or a ValueError that says why it cannot be shrunk."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} is not a transformers model; give one that AutoModelForCausalLM loads")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not model.can_generate() or _is_encoder(model):
        raise ValueError(f"{name} is not a causal language model: it has no cache to shrink")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} has is_causal=False: tokens see the future, so nothing may be cached")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not use transformers' attention interface, so its cache cannot be ragged")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"{name} shares keys between layers, which a ragged cache does not support")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} caches latents (MLA), which are already shared by all heads")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    strange = sorted(set(kinds) - set(_WINDOWED) - set(_FULL))
    if strange:
        raise ValueError(
            f"{name} has layers of kind {', '.join(strange)}; only full and sliding attention can be shrunk"
        )
    return [LayerPlan(window if kind in _WINDOWED else None) for kind in kinds]


def _is_encoder(model: Any) -> bool:
    """Encoders that may become decoders say so by is_decoder; some decoders leave that at its default, False."""
    config = model.config.get_text_config(decoder=True)
    return config.model_type not in TESTED and getattr(config, "is_decoder", True) is False


def rotations(model: Any) -> list[Tensor | None]:
    """Per layer the angles [d / 2] by which one position turns a key's halves, None where it has no position."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if config.model_type not in TESTED:
        raise ValueError(f"{name}: how it rotates keys is not known here; use positions='text'")
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    if len(rotary) != 1:
        raise ValueError(f"{name} has no rotary positions that could be moved; use positions='text'")
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(kinds)
    found: list[Tensor | None] = []
    for kind, turns in zip(kinds, rotated, strict=True):
        own = rotary[0].rope_type
        if (own[kind] if isinstance(own, dict) else own) in ("dynamic", "longrope"):
            raise ValueError(f"{name}: its rotary angles change with the length; use positions='text'")
        angles = getattr(rotary[0], f"{kind}_inv_freq") if isinstance(own, dict) else rotary[0].inv_freq
        found.append(angles.double() if turns else None)
    return found


def register() -> None:
    """Makes the two functions known to transformers, under our own name; harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _describe_mask)


def is_attached(model: Any) -> bool:
    return getattr(model.config, "_attn_implementation", None) == NAME


_originals: weakref.WeakKeyDictionary[Any, list[tuple[nn.Module, Any]]] = weakref.WeakKeyDictionary()


def attach(model: Any) -> None:
    """Lets the model attend through ragged layers. Configs are copied first: several models may share one."""
    if is_attached(model):
        return
    plan(model)
    register()
    kept: list[tuple[nn.Module, Any]] = []
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:
            kept.append((module, config))
            module.config = copy.deepcopy(config, memo)
    _originals[model] = kept
    try:
        model.set_attn_implementation(NAME)
    except BaseException:
        detach(model)
        raise


def detach(model: Any) -> None:
    """Gives the model its own configs back, and with them its own attention."""
    for module, config in _originals.pop(model, []):
        module.config = config


def library_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


_probed: weakref.WeakSet[Any] = weakref.WeakSet()


def check_supported(model: Any, make_full: Callable[[Any], Any]) -> None:
    """Families that are tested pass; any other model must give the dense cache's logits on a short probe."""
    plan(model)
    if model.config.get_text_config(decoder=True).model_type in TESTED or model in _probed:
        return
    name, training = type(model).__name__, model.training
    attached = is_attached(model)
    model.eval()
    try:
        detach(model)
        wanted = _probe(model, library_cache(model))
        attach(model)
        given = _probe(model, make_full(model))
    except Exception as error:
        raise ValueError(f"{name} is not among the tested families and a probe of it failed: {error}") from error
    finally:
        model.train(training)
        if not attached:
            detach(model)
    worst = float((wanted - given).abs().max() / wanted.abs().max().clamp_min(1e-6))
    limit = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 3e-2
    if not worst <= limit:
        raise ValueError(
            f"{name} is not among the tested families ({', '.join(TESTED)}), and on a probe its logits with a full "
            f"ragged cache differ from the dense cache's by {worst:.2g} of their size (allowed: {limit:g}): not shrunk"
        )
    _probed.add(model)


@torch.no_grad()
def _probe(model: Any, cache: Any) -> Tensor:
    """Logits of a padded prompt, a chunk and three single tokens."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(2 * 25, device=device).view(2, 25).mul(7919).add(11) % vocabulary
    padding = torch.ones_like(tokens)
    padding[1, :5] = 0
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    logits, start = [], 0
    for end in (17, 22, 23, 24, 25):
        out = model(
            tokens[:, start:end],
            attention_mask=padding[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits[:, max(0, 5 - start) :])
        start = end
    return torch.cat(logits, 1)


@contextmanager
def intercepted(model: Any, check: Callable[[Any], Any]) -> Iterator[None]:
    """While active every call of the model, and of its generate, gets its cache from check(the cache given or None)."""
    inner = model.__dict__.get("generate")
    generate = model.generate

    def with_cache(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache_implementation"):
            raise ValueError(
                f"cache_implementation={kwargs['cache_implementation']!r} asks for a cache that a policy "
                "cannot shrink; leave it out"
            )
        if kwargs.get("compile_config") is not None:
            raise ValueError(
                "compile_config asks for a static graph, and a shrunk cache changes its shapes from token to token; "
                "leave it out"
            )
        if kwargs.get("use_cache", True):
            kwargs["past_key_values"] = check(kwargs.get("past_key_values"))
        return generate(*args, **kwargs)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wanted = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is not None or (module.config.use_cache if wanted is None else wanted):
            kwargs["past_key_values"] = check(kwargs.get("past_key_values"))
        return args, kwargs

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    model.generate = with_cache
    try:
        yield
    finally:
        hook.remove()
        del model.generate
        if inner is not None:
            model.generate = inner
