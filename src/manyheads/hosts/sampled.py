"""A transformers model whose queries and keys meet in windows that are drawn anew at every layer and pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.functional.shuffled import draw_windows, from_windows, into_windows
from manyheads.hosts.attend import Scoring, causal_attention, masked_attention, pack
from manyheads.hosts.attention import as_visibility, describe_mask, on_tensors
from manyheads.hosts.reading import run_again_alike
from manyheads.hosts.sites import attends_alone, sites
from manyheads.hosts.switching import switched, uncompiled
from manyheads.hosts.visibility import Visibility
from manyheads.mechanism import Mechanism

NAME = "manyheads_sampled"
_UNKNOWN = ("position_bias", "cache")


@dataclass(frozen=True)
class Drawn:
    """keep, spread: as `draw_windows` takes them."""

    keep: float
    spread: float


# By the configs of the time, which a layer that is computed anew gets back; not in them, where a checkpoint that is
# saved meanwhile would hold it.
_settings: dict[int, Drawn] = {}


def _set(config: Any, drawn: Drawn) -> None:
    if id(config) not in _settings:
        weakref.finalize(config, _settings.pop, id(config), None)
    _settings[id(config)] = drawn


@contextmanager
def in_windows(model: nn.Module, drawn: Drawn) -> Iterator[None]:
    """While open, self attention in training mode is computed within drawn windows, and nothing else is; in eval mode
    it is whole. Layers that gradient checkpointing computes anew draw as in their first run.

    ValueError for a model whose attention is no self attention of transformers' interface alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = type(model).__name__
    for site in sites(model):
        if isinstance(site.module, Mechanism) or attends_alone(site.module) or site.kind != "self":
            raise ValueError(
                f"{name}: {site.name} ({site.kind} attention) is no self attention of transformers' interface, "
                "of which keys could be left out; wrap a mechanism in LocallySubsampled"
            )
        if id(site.module.config) in _settings:
            raise ValueError(f"{name} has its keys drawn already; leave that first")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, describe_mask)
    with uncompiled(), run_again_alike(model), switched(model, NAME):
        for site in sites(model):
            _set(site.module.config, drawn)
        yield


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    name = type(module).__name__
    scoring = Scoring(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling), kwargs.get("softcap"), kwargs.get("s_aux")
    )
    if any(kwargs.get(each) is not None for each in _UNKNOWN):
        raise ValueError(f"{name} adds a position bias of its own, which is not known for keys that are drawn")
    if not module.training:
        return on_tensors(module, query, key, value, attention_mask, dropout, scoring, kwargs), None
    if dropout:
        raise ValueError(
            f"{name}: attention dropout of {dropout}; set it to 0 in the config, drawing keys is in its place"
        )
    n = query.shape[2]
    if key.shape[2] != n:
        raise ValueError(f"{name}: {n} queries on {key.shape[2]} keys; keys are drawn in whole passes, without a cache")
    return _within(module, query, key, value, attention_mask, scoring, kwargs), None


def _within(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scoring: Scoring,
    kwargs: dict[str, Any],
) -> Tensor:
    """[b, n, h, e]."""
    b, _, n, _ = query.shape
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    seen = None if mask is None and not causal else as_visibility(mask, n, n, kwargs.get("sliding_window"))
    real = torch.ones(b, n, dtype=torch.bool, device=query.device)
    if seen is not None and seen.padding is not None:
        real = seen.padding.expand(b, -1)
    drawn = _settings.get(id(module.config))
    if drawn is None:
        raise ValueError(f"{type(module).__name__} trains outside of the locally_subsampled that its model was in")
    places, there = draw_windows(real, drawn.keep, drawn.spread)
    q, k, v = (into_windows(t.transpose(1, 2), places).transpose(1, 2) for t in (query, key, value))
    queries = pack(q, k.shape[1])
    spare = places.numel() > b * n
    if seen is not None and scoring.plain and seen.only_causal(n):
        # Slots that are left over stand last, where no query looks.
        found = causal_attention(queries, k, v, scoring.scale)
    else:
        whole = seen is None and not spare
        allowed = None if whole else _allowed(seen, places, there)
        found = masked_attention(queries, k, v, scoring, lambda rows: None if allowed is None else allowed[:, :, rows])
    return from_windows(found.flatten(1, 2).transpose(1, 2), places, n).contiguous()


def _allowed(seen: Visibility | None, places: Tensor, there: Tensor) -> Tensor:
    """[b c, 1 or h, w, w] for the windows' own places: bool, or a float mask's numbers."""
    keys = there.flatten(0, 1)[:, None, None]
    if seen is None:
        return keys.expand(-1, -1, keys.shape[-1], -1)
    at = places.flatten(0, 1)
    i, j = at[:, None, :, None], at[:, None, None, :]
    rows = torch.arange(len(places), device=at.device).repeat_interleave(places.shape[1])[:, None, None, None]
    if seen.tensor is not None:
        heads = torch.arange(seen.tensor.shape[1], device=at.device)[:, None, None]
        found = seen.tensor[rows if len(seen.tensor) > 1 else torch.zeros_like(rows), heads, i, j]
        if found.dtype != torch.bool:
            return found.masked_fill(~keys, torch.finfo(found.dtype).min)
        return found & keys
    if seen.plain:
        allowed = j <= i
        return keys & (allowed if seen.window is None else allowed & (j > i - seen.window))
    assert seen.rule is not None
    return keys & seen.rule(rows, torch.zeros_like(rows), i, j)
