"""modPAI: the scores of image tokens raised at the place that speaks, and the text's own prior taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import given_cache
from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import tap
from manyheads.hosts.thin import check_whole
from manyheads.steer.beside import beside
from manyheads.steer.common import inside, numbers
from manyheads.steer.method import Prompt, steering
from manyheads.steer.pictures import blind, check_last, image_places, same_rows


@contextmanager
def imbalance(
    model: Any,
    inputs: Mapping[str, Any],
    alpha: float = 0.9,
    *,
    beta: float = 0.3,
    gamma: float = 1.1,
    salient: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Claim: text outweighs the picture in attention; raising image scores, salient ones more, mends hallucination.

    Part one: z_j' = z_j + alpha |z_j| for salient image tokens j, z_j + beta |z_j| for the other image tokens, z the
    scores before the softmax, in the rows from the prompt's last place on, all heads of the layers (default: all but
    the first two). Part two: log p' = gamma log p(image and text) - (gamma - 1) log p(text alone), not normalised, the
    text alone as in `pictures.blind`. alpha = beta = 0 and gamma = 1 change nothing. salient: [b, n] bool places of the
    prompt; default `salient_tokens`.
    Source: arXiv 2501.12206, hasanar1f/llava-hallunication-fix modPAI (alpha 0.9, or 0.5 for yes-or-no questions). A
    softmax does not mind a constant added to its scores, this rule does. The strength per head that the abstract tells
    of is not in the released files, and not here.
    """
    if min(alpha, beta) < 0 or not gamma >= 1:
        raise ValueError(f"imbalance: want alpha, beta >= 0 and gamma >= 1; got {alpha:g}, {beta:g}, {gamma:g}")
    image = image_places(model, inputs, "imbalance")
    check_last(inputs, "imbalance")
    if salient is None:
        salient = salient_tokens(model, inputs) if alpha != beta else image
    if salient.shape != image.shape or bool((salient & ~image).any()):
        raise ValueError(f"imbalance: salient {list(salient.shape)} must mark image tokens of {list(image.shape)}")
    stack, first = text_stack(model), image.shape[1] - 1
    every = sorted(site.layer for site in choose(model, None, stack, "self"))
    strength = beta * image.float() + (alpha - beta) * salient.float()

    def reader(call: Any) -> Tensor | None:
        return _raised(opened(call, "imbalance"), strength, first)

    with ExitStack() as open_:
        if alpha or beta:
            chosen = (every[2:] or every) if layers is None else list(layers)
            open_.enter_context(tap(model, reader, layers=chosen, stack=stack, kind="self"))
        if gamma != 1:
            open_.enter_context(beside(model, [_alone(model)], _guided(gamma), "imbalance"))
        yield


def _raised(call: AttentionCall, strength: Tensor, first: int) -> Tensor | None:
    check_whole(call.site.module, "imbalance")
    n, m = call.query.shape[2], call.key.shape[2]
    start = max(0, first - (m - n))
    if start >= n:
        return None
    own = same_rows(strength, call.query.shape[0], "imbalance")
    factors = torch.nn.functional.pad(own, (0, max(0, m - own.shape[1])))[:, None, None, :m].to(call.query.device)

    def change(scores: Tensor, rows: slice) -> Tensor:
        return scores + factors.to(scores) * scores.abs()

    return call.rescored(change, rows=slice(start, n))


def _alone(model: Any) -> Any:
    def run(named: dict[str, Any]) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
        return blind(model, named, "imbalance", given_cache(named)), nullcontext()

    return run


def _guided(gamma: float) -> Any:
    def combine(own: Tensor, others: Sequence[Tensor]) -> Tensor:
        return gamma * own.log_softmax(-1) - (gamma - 1) * others[0].log_softmax(-1)

    return combine


@torch.no_grad()
def salient_tokens(model: Any, inputs: Mapping[str, Any], share: float = 0.5) -> Tensor:
    """[b, n] bool: the share of image tokens whose patches the vision tower's class token attends to most, on average
    over heads, in the layer whose states become image tokens. ValueError where there is no class token, or where image
    tokens are not one to a patch."""
    image = image_places(model, inputs, "salient_tokens")
    sites = choose(model, None, "vision", "self")
    layer = getattr(model.config, "vision_feature_layer", -2)
    if not isinstance(layer, int) or getattr(model.config, "vision_feature_select_strategy", None) != "default":
        raise ValueError("salient_tokens: the vision tower has no class token that is left out of the image tokens")
    layer = len(sites) + layer if layer < 0 else layer - 1
    rows: list[Tensor] = []

    def reader(call: Any) -> None:
        rows.append(opened(call, "salient_tokens").weights(rows=slice(0, 1)).mean(1)[:, 0, 1:])

    with tap(model, reader, layers=[layer], stack="vision", kind="self"):
        model(**inputs, use_cache=False)
    scores, count = rows[0], int(image[0].sum())
    if scores.numel() != image.sum():
        raise ValueError(f"salient_tokens: {count} image tokens to a row are not one to each of its patches")
    scores = scores.reshape(image.shape[0], count)
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(1, scores.topk(max(1, round(share * count)), -1).indices, True)
    return torch.zeros_like(image).masked_scatter(image, best)


@steering(
    "imbalance",
    title="scores of image tokens raised, the text's prior taken off",
    source="arXiv 2501.12206",
    kinds=("vision-language",),
    neutral={"alpha": 0.0, "beta": 0.0, "gamma": 1.0},
    strength="alpha",
    reach=(0.0, 2.0),
    towers=(
        "text",
        "logits",
    ),
)
def _open(
    model: Any,
    prompt: Prompt,
    *,
    alpha: float = 0.5,
    beta: float = 0.3,
    gamma: float = 1.1,
    span: str | None = None,
    layers: str | None = None,
) -> AbstractContextManager[None]:
    """span: image tokens that count as salient; those that the class token looks at unless given."""
    ids = prompt.inputs["input_ids"]
    salient = None if span is None else inside(prompt.places(span), ids.shape[1], ids.device).expand(ids.shape)
    own = None if layers is None else numbers(layers, "imbalance: layers")
    return imbalance(model, prompt.inputs, alpha, beta=beta, gamma=gamma, salient=salient, layers=own)
