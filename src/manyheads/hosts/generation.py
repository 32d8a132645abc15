"""Calls of a model and of its generate, on the way to the model."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import given_cache, with_cache
from manyheads.hosts.attention import attach, detach, is_attached
from manyheads.hosts.device import device_of, evaluating
from manyheads.hosts.families import TESTED, is_own, layer_plans
from manyheads.hosts.wrappers import untraced


def library_cache(model: Any) -> Any:
    if is_own(model):
        from manyheads.models import ManyheadsCache

        return ManyheadsCache(model.decoder_stack.memories)
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


_probed: weakref.WeakSet[Any] = weakref.WeakSet()


def check_supported(model: Any, make_full: Callable[[Any], Any]) -> None:
    """Families that are tested pass; any other model must give the dense cache's logits on a short probe."""
    layer_plans(model)
    if model.config.get_text_config(decoder=True).model_type in TESTED or model in _probed:
        return
    name, attached = type(model).__name__, is_attached(model)
    try:
        with evaluating(model):
            detach(model)
            wanted = _probe(model, library_cache(model))
            attach(model)
            given = _probe(model, make_full(model))
    except Exception as error:
        raise ValueError(f"{name} is not among the tested families and a probe of it failed: {error}") from error
    finally:
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
    device = device_of(model)
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


# Fields of a GenerationConfig that ask for another cache than a policy's. Those that say how tokens are chosen, in what
# chunks a prompt is fed and who guesses ahead are the library's business with any cache.
_OTHER_CACHES = {
    "cache_implementation": "asks for a cache that a policy cannot shrink",
    "cache_config": "describes a cache that a policy replaces",
    "max_cache_len": "is the length of a static cache, and a shrunk one is as long as its policy says",
    "compile_config": "asks for a static graph, and a shrunk cache changes its shapes from token to token",
}
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@contextmanager
def intercepted(model: Any, check: Callable[[Any], Any]) -> Iterator[None]:
    """While active every call of the model, and of its generate, gets its cache from check(the cache given or None).

    A call that says use_cache=False gets none. A config that says so does not speak of this call: it is often left
    over from training with gradient checkpointing, and generate caches all the same."""
    names = ("generate", "__deepcopy__", *(name for name in _CONTINUOUS if hasattr(model, name)))
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    hooks = [
        # Before the hook that tells a cache what comes: it is told of this one too.
        own.register_forward_pre_hook(untraced(model, _with_cache(own, check)), prepend=True, with_kwargs=True)
        for own in {id(own): own for own in (model, model.base_model)}.values()
    ]
    model.generate = _cached_generate(model, model.generate, check)
    model.__deepcopy__ = _not_copied(model)
    for name in names[2:]:
        setattr(model, name, _refused(name))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in names:
            delattr(model, name)
        for name, own in before.items():
            setattr(model, name, own)


def _with_cache(model: Any, check: Callable[[Any], Any]) -> Callable[..., tuple[Any, Any]]:
    names = list(inspect.signature(model.forward).parameters)
    config = model.config.get_text_config(decoder=True)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        placed = dict(zip(names, args, strict=False))
        if placed.keys() & kwargs.keys():
            return args, kwargs  # forward itself says what is wrong
        kwargs = placed | kwargs
        given, wanted = given_cache(kwargs), kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", None) if wanted is None else wanted
        if _checkpoints(module):
            # Layers then drop any cache that they are handed, and the library says use_cache=False itself.
            _check_none(module, given)
        elif given is not None or wanted:
            kwargs = with_cache(kwargs, check(given))
        return (), kwargs

    return before


def _cached_generate(model: Any, generate: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    names = list(inspect.signature(type(model).generate).parameters)[1:]
    # For guesses of the model's own lower layers.
    exits: list[Any] = []

    def cached(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if kwargs.get("use_cache") is False:
            _check_none(model, given_cache(kwargs))
            return generate(**kwargs)
        if _checkpoints(model):
            raise ValueError(
                f"{type(model).__name__} is training with gradient checkpointing, in which its layers read no cache, "
                "so that generate would see one token at a time; call model.eval() first"
            )
        own = kwargs.get("generation_config")
        resolved, _ = model._prepare_generation_config(own, **{k: v for k, v in kwargs.items() if k not in names})
        for name, reason in _OTHER_CACHES.items():
            value = getattr(resolved, name, None)
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} {reason}; leave it out of the call, its generation_config and "
                    "model.generation_config"
                )
        if resolved.use_cache is not True:
            kwargs |= _caching(own)
        given = given_cache(kwargs)
        if given is None and resolved.is_assistant and exits:
            given = exits.pop()
        if resolved.assistant_early_exit is not None:
            # Made while the model still says how many layers it has.
            exits.append(check(None))
        cache = check(given)
        kwargs = with_cache(kwargs, cache)
        if resolved.prefill_chunk_size is not None and not cache.get_seq_length():
            cache.expect(_prompt_tokens(kwargs))
        try:
            return _generated(generate, kwargs, cache, resolved)
        finally:
            # Calls inside this one (early exits, guidance) had caches of their own.
            exits.clear()
            check(cache)

    return cached


def _prompt_tokens(kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt that a call of generate was given, 1 where there is none."""
    given = [kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(name) is not None]
    return int(given[-1].shape[1]) if given else 1


def _caching(config: Any) -> dict[str, Any]:
    """Arguments by which generate caches whatever its configs say."""
    if config is None:
        return {"use_cache": True}
    config = copy.deepcopy(config)
    config.use_cache = True
    return {"generation_config": config}


def _generated(generate: Callable[..., Any], kwargs: dict[str, Any], cache: Any, resolved: Any) -> Any:
    if not resolved.is_assistant:
        return generate(**kwargs)
    # The library marks the caches that it makes for guesses; this one it did not make.
    cache.assist()
    return generate(**kwargs)


def _checkpoints(model: Any) -> bool:
    return bool(model.training) and any(getattr(own, "gradient_checkpointing", False) for own in model.modules())


def _check_none(model: Any, cache: Any) -> None:
    if cache is not None:
        raise ValueError(
            f"past_key_values is given to a call of {type(model).__name__} that caches nothing (use_cache=False, or "
            "training with gradient checkpointing); leave one of the two out"
        )


def _not_copied(model: Any) -> Callable[..., Any]:
    def refuse(memo: Any) -> Any:
        raise ValueError(
            f"{type(model).__name__} is inside a policy's block, which a copy of it would not be: the copy's generate "
            "would be this model's; copy it before the block, or after"
        )

    return refuse


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{name} batches continuously, in a paged cache that a policy cannot shrink; call generate, or leave the "
            "policy's block first"
        )

    return refuse
