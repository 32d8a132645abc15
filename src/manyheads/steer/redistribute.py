"""VAR: what sink tokens take in image-centric heads goes to the image's other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import opened
from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import AttentionCall, tap
from manyheads.steer.common import check_share, positions


@contextmanager
def redistribute(
    model: nn.Module,
    image: Sequence[int] | slice,
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
    others. Rows sum to 1 as before; share 0: no change. image: the places of the image's tokens (or of any context).
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
    where = text_stack(model, stack)
    wanted = {site.layer: site for site in choose(model, None, where, "self")}
    chosen = sorted(wanted) if layers is None else list(layers)

    def watch(layer: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = _sinks(args[0] if args else kwargs["hidden_states"], sink_dims, threshold)
            # While decoding the earlier tokens are known from the passes before.
            earlier = sinks.get(layer)
            sinks[layer] = found if found.shape[1] > 1 or earlier is None else torch.cat([earlier, found], 1)

        return before

    def reader(call: Any) -> Tensor | None:
        if share == 0:
            return None
        marked = call.memo.setdefault("sinks", sinks[call.layer])
        return _moved(opened(call, "redistribute"), marked, positions(image, call.key.shape[2]), share, centric, least)

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
    call: AttentionCall, sinks: Tensor, places: list[int], share: float, centric: float, least: float
) -> Tensor | None:
    m = call.key.shape[2]
    if not places or sinks.shape[1] != m:
        return None
    inside = torch.zeros(m, dtype=torch.bool, device=sinks.device)
    inside[places] = True
    seen = (inside & ~sinks)[:, None, None]  # the image's tokens that say something
    all_inside, drains = inside[None, None, None], sinks[:, None, None]
    marked = (sinks & inside).any(-1)[:, None, None, None]
    first = max(places) + 1 - (m - call.query.shape[2])

    def edit(weights: Tensor, rows: slice) -> Tensor:
        told = (weights * seen).sum(-1, keepdim=True)
        held = (weights * all_inside).sum(-1, keepdim=True)
        chosen = marked & (held >= least) & (told >= centric * held) & (told > 1e-6)
        after = torch.arange(rows.start, rows.stop, device=weights.device)[:, None] >= first
        budget = share * (weights * drains).sum(-1, keepdim=True)
        given = torch.where(drains, (1 - share) * weights, weights + budget * weights * seen / told.clamp_min(1e-12))
        return torch.where(after & chosen, given, weights)

    return call.mix(edit)
