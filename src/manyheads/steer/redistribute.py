"""VAR: what sink tokens take in image-centric heads goes to the image's other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import AttentionCall, tap
from manyheads.steer.calibrate import column_means, real_keys
from manyheads.steer.common import Span, behind, check_share, inside_call, numbers
from manyheads.steer.method import Prompt, steering


@contextmanager
def redistribute(
    model: nn.Module,
    image: Span,
    share: float,
    *,
    sink_dims: Sequence[int],
    threshold: float = 20.0,
    centric: float = 0.5,
    least: float = 0.2,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
) -> Iterator[None]:
    """Claim: sink tokens hold attention that says nothing; given to the image, it makes answers follow what is seen.

    A token is a sink where max over sink_dims of |x_d| / rms(x) >= threshold, x its residual state before the layer.
    For the queries after the image, a head is image-centric where the image holds at least `least` of the attention,
    sinks among it, and its tokens that are no sinks at least `centric` of that; a share p of what all sinks hold there
    is then given to those tokens: A'_ij = (1 - p) A_ij at sinks, A_ij (1 + p sum_sinks A / sum_image A) at the image's
    others. Rows sum to 1 as before; share 0: no change. image: the places of the image's tokens
    (or of any context), [b, n] bool where rows differ.
    Source: arXiv 2503.03321 (p 0.6, threshold 20); the head rule as in its released code, where rho = 1 - centric and
    summ = least. sink_dims are the model's massive dimensions: see the detector of massive values.
    stack: whose layers; the one that reads text.
    """
    check_share("redistribute: share", share)
    check_share("redistribute: centric", centric)
    check_share("redistribute: least", least)
    if not sink_dims:
        raise ValueError("redistribute: sink_dims is empty; give the residual dimensions that mark a sink")
    sinks: dict[int, Tensor] = {}
    latest: dict[int, Tensor] = {}
    where = text_stack(model, stack)
    wanted = {site.layer: site for site in choose(model, None, where, "self")}
    chosen = sorted(wanted) if layers is None else list(layers)

    def watch(layer: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            latest[layer] = _sinks(args[0] if args else kwargs["hidden_states"], sink_dims, threshold)

        return before

    def known(call: AttentionCall) -> Tensor:
        """The earlier tokens are known from the passes before."""
        past = call.key.shape[2] - call.query.shape[2]
        before = sinks.get(call.layer) if past else latest[call.layer][:, :0]
        if before is None or before.shape[1] < past or before.shape[0] != call.query.shape[0]:
            raise ValueError("redistribute: the cache was filled outside of this block; start the text inside")
        sinks[call.layer] = torch.cat([before[:, :past], latest[call.layer]], 1)
        return sinks[call.layer]

    def reader(call: Any) -> Tensor | None:
        if share == 0:
            return None
        own = opened(call, "redistribute")
        if "sinks" not in call.memo:
            call.memo["sinks"] = known(own)
        return _moved(own, call.memo["sinks"], image, share, centric, least)

    with ExitStack() as hooks:
        for layer in chosen:
            if layer not in wanted:
                raise ValueError(f"redistribute: there is no layer {layer}; layers are 0 to {max(wanted)}")
            parent = model.get_submodule(wanted[layer].path.rpartition(".")[0])
            hooks.callback(parent.register_forward_pre_hook(watch(layer), with_kwargs=True).remove)
        hooks.enter_context(tap(model, reader, layers=chosen, stack=where, kind="self"))
        yield


def _sinks(states: Tensor, dims: Sequence[int], threshold: float) -> Tensor:
    """[b, n] bool of residual states [b, n, dim]."""
    if states.dim() != 3:
        raise ValueError(f"redistribute: states {list(states.shape)} of this stack are no rows of tokens [b, n, dim]")
    wrong = [d for d in dims if not 0 <= d < states.shape[-1]]
    if wrong:
        raise ValueError(f"redistribute: sink_dims {wrong} do not exist; states have {states.shape[-1]} dimensions")
    scale = states.float().pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return (states[..., list(dims)].float().abs() / scale).amax(-1) >= threshold


def _moved(
    call: AttentionCall, sinks: Tensor, image: Span, share: float, centric: float, least: float
) -> Tensor | None:
    n = call.query.shape[2]
    places = inside_call(image, call, "redistribute")
    late = behind(places, n)
    marked = (sinks & places).any(-1)
    if not bool((late & marked[:, None]).any()):
        return None
    seen = (places & ~sinks)[:, None, None]  # the image's tokens that say something
    all_inside, drains = places[:, None, None], sinks[:, None, None]

    def edit(weights: Tensor, rows: slice) -> Tensor:
        told = (weights * seen).sum(-1, keepdim=True)
        held = (weights * all_inside).sum(-1, keepdim=True)
        chosen = marked[:, None, None, None] & (held >= least) & (told >= centric * held) & (told > 1e-6)
        budget = share * (weights * drains).sum(-1, keepdim=True)
        given = torch.where(drains, (1 - share) * weights, weights + budget * weights * seen / told.clamp_min(1e-12))
        return torch.where(late[:, None, rows, None] & chosen, given, weights)

    first = int(late.any(0).long().argmax())
    return call.mix(edit, rows=slice(first, n))


@torch.no_grad()
def find_sink_dims(
    model: Any, inputs: Mapping[str, Any], *, count: int = 2, alpha: float = 5.0, stack: str | None = None
) -> list[int]:
    """The dimensions of the residual state that mark a sink in this model, the strongest first: where |x_d| / rms(x) is
    higher at tokens that are attended to (alpha / n of a layer's attention on average over heads and queries) than at
    the others, on average over the layers but the first two. The paper gives two per model, read off by hand.
    ValueError where no layer has such a token."""
    where, latest = text_stack(model, stack), {}
    rows: list[Tensor] = []

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latest["states"] = args[0] if args else kwargs["hidden_states"]

    def reader(call: Any) -> None:
        own, states = opened(call, "find_sink_dims"), latest["states"].float()
        real = real_keys(own)[:, 0].expand(states.shape[:2])
        attended = column_means(own, None).mean(1) > alpha / real.sum(-1, keepdim=True)
        if states.shape[:2] != attended.shape:
            raise ValueError("find_sink_dims: give whole prompts, without a cache")
        high = states.abs() / states.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        some, others = attended & real, ~attended & real
        if bool(some.any()) and bool(others.any()):
            rows.append(high[some].mean(0) - high[others].mean(0))

    with ExitStack() as hooks:
        found = choose(model, None, where, "self")
        for site in found[2:] or found:
            parent = model.get_submodule(site.path.rpartition(".")[0])
            hooks.callback(parent.register_forward_pre_hook(watch, with_kwargs=True).remove)
        own = [site.layer for site in found[2:] or found]
        hooks.enter_context(tap(model, reader, layers=own, stack=where, kind="self"))
        model(**inputs, use_cache=False)
    if not rows:
        raise ValueError(
            f"redistribute: no token of this prompt gets {alpha:g} times its share of a layer's attention, so there is "
            "no sink to find the dimensions by; give sink_dims"
        )
    return [int(d) for d in torch.stack(rows).mean(0).argsort(descending=True)[:count]]


# The published threshold is 20 of the 64 = sqrt(4096) that a state of LLaMA-7B can reach at most.
_THRESHOLD, _WIDTH = 20.0, 4096


@steering(
    "redistribute",
    title="what sink tokens take given to the image's other tokens",
    source="arXiv 2503.03321",
    kinds=("language", "vision-language"),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
)
def _open(
    model: Any,
    prompt: Prompt,
    *,
    share: float = 0.4,
    span: str | None = None,
    sink_dims: str | None = None,
    threshold: float | None = None,
    centric: float = 0.5,
    least: float = 0.2,
    layers: str | None = None,
) -> AbstractContextManager[None]:
    """span: the image, or the marked words of a prompt without one. sink_dims: found on this prompt. threshold: in
    proportion to the paper's. layers: all but the first two and the last."""
    where = text_stack(model)
    dims = find_sink_dims(model, prompt.inputs) if sink_dims is None else numbers(sink_dims, "redistribute: sink_dims")
    width = model.config.get_text_config(decoder=True).hidden_size
    every = sorted(site.layer for site in choose(model, None, where, "self"))
    return redistribute(
        model,
        prompt.places(span or ("image" if "image" in prompt.spans else "text")),
        share,
        sink_dims=dims,
        threshold=_THRESHOLD * (width / _WIDTH) ** 0.5 if threshold is None else threshold,
        centric=centric,
        least=least,
        layers=(every[2:-1] or every) if layers is None else numbers(layers, "redistribute: layers"),
        stack=where,
    )
