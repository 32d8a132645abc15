"""Calls of a model and of its generate, on the way to the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.attention import attach, detach, is_attached
from manyheads.hosts.families import TESTED, layer_plans


def library_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


_probed: weakref.WeakSet[Any] = weakref.WeakSet()


def check_supported(model: Any, make_full: Callable[[Any], Any]) -> None:
    """Families that are tested pass; any other model must give the dense cache's logits on a short probe."""
    layer_plans(model)
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
