"""AGLA: what the model says of the whole picture, and of the part of it that the question is about, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import record
from manyheads.steer.beside import beside, plausible
from manyheads.steer.common import check_share
from manyheads.steer.method import Prompt, steering
from manyheads.steer.pictures import check_last, image_places


@contextmanager
def agla(model: Any, local: Tensor, alpha: float = 2.0, *, beta: float = 0.5) -> Iterator[None]:
    """Claim: a picture with all taken out that the question is not about distracts less; both views together answer
    better than either.

    z' = z + alpha z_local, the logits ADDED, not contrasted, z_local those of the same prompt with the pixels `local`;
    tokens with z < log(beta) + max z are out (-inf). alpha 0 and beta 0 change nothing; alpha 0 with a beta still cuts.
    local: pixel_values, as by `local_view`.
    Source: arXiv 2406.12718, Lackel/AGLA `eval/sample.py` (2 and 0.5). z' is not divided by 1 + alpha, so that it is
    sharper too.
    """
    check_share("agla: beta", beta)
    if not alpha >= 0:
        raise ValueError(f"agla: alpha must be at least 0; got {alpha}")
    if alpha == 0 and beta == 0:
        yield
        return

    def run(named: dict[str, Any]) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
        given = named.get("pixel_values")
        if given is not None:
            if given.shape[1:] != local.shape[1:] or given.shape[0] % local.shape[0]:
                raise ValueError(f"agla: local is {list(local.shape)}, the call's pixels are {list(given.shape)}")
            named["pixel_values"] = local.repeat_interleave(given.shape[0] // local.shape[0], 0).to(given)
        return named, nullcontext()

    def combine(own: Tensor, others: Sequence[Tensor]) -> Tensor:
        mixed = own + alpha * others[0] if alpha else own
        return plausible(mixed, own, beta)

    with beside(model, [run] if alpha else [], combine, "agla"):
        yield


def local_view(pixels: Tensor, relevance: Tensor, kept: float, *, black: Tensor | None = None) -> Tensor:
    """Pixels [b, c, height, width] with all but the `kept` share of them black: those where the map, made as large as
    the picture (bicubic), blurred (deviation 0.02 of its longer side) and scaled to [0, 1], is highest. relevance
    [b, rows, columns]. black [c]: the value of black pixels; each channel's least one unless given. kept 1 keeps all.

    In the paper the map is Grad-CAM of BLIP's image-text matching, and kept = 1 - (its similarity) / 2: a picture that
    matches better keeps LESS. Which map, and how much, is the caller's here."""
    check_share("local_view: kept", kept)
    if pixels.dim() != 4 or relevance.dim() != 3 or relevance.shape[0] != pixels.shape[0]:
        raise ValueError(f"local_view: a map {list(relevance.shape)} is not of pixels {list(pixels.shape)}")
    if kept == 1:
        return pixels
    size = pixels.shape[-2:]
    wide = nn.functional.interpolate(relevance[:, None].float(), size, mode="bicubic", align_corners=False)
    smooth = _blurred(wide, 0.02 * max(size))
    low, high = smooth.amin((-2, -1), keepdim=True), smooth.amax((-2, -1), keepdim=True)
    flat = ((smooth - low) / (high - low).clamp_min(1e-12)).flatten(1)
    rank = min(int(flat.shape[1] * kept), flat.shape[1] - 1)
    mask = (flat >= flat.sort(-1, descending=True).values[:, rank : rank + 1]).view(-1, 1, *size)
    dark = pixels.amin((-2, -1), keepdim=True) if black is None else black.to(pixels)[None, :, None, None]
    return torch.where(mask, pixels, dark)


def _blurred(maps: Tensor, deviation: float) -> Tensor:
    """[b, 1, height, width] through a Gaussian, four deviations wide, edges mirrored as far as there is picture."""
    reach = min(max(1, int(4 * deviation + 0.5)), min(maps.shape[-2:]) - 1)
    at = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = (-(at**2) / (2 * deviation**2)).exp()
    kernel = kernel / kernel.sum()
    for shape, pad in (((-1, 1), (0, 0, reach, reach)), ((1, -1), (reach, reach, 0, 0))):
        maps = nn.functional.conv2d(nn.functional.pad(maps, pad, mode="reflect"), kernel.view(1, 1, *shape))
    return maps


def relevance_map(model: Any, inputs: Mapping[str, Any], *, layer: int | None = None) -> Tensor:
    """[b, rows, columns]: mean over heads of relu(gradient) A, from the prompt's last place to each image token in a
    middle layer, the gradient of the likeliest next token's logit: Grad-CAM on the model's own attention. Image tokens
    must be a square, in rows."""
    image = image_places(model, inputs, "relevance_map")
    check_last(inputs, "relevance_map")
    count = int(image[0].sum())
    side, pixels, grid = round(count**0.5), inputs["pixel_values"], inputs.get("image_grid_thw")
    alone = len(pixels if grid is None else grid) == len(image)
    flat = grid is not None and bool(((grid[:, 0] != 1) | (grid[:, 1] != grid[:, 2])).any())
    if side * side != count or not alone or flat or (pixels.dim() == 4 and pixels.shape[-2] != pixels.shape[-1]):
        raise ValueError(
            f"relevance_map: {count} image tokens in a row, of pixel_values {list(pixels.shape)}"
            f"{'' if grid is None else f' in grids {grid.tolist()}'}: want one square picture for each row"
        )
    stack = text_stack(model)
    layers = sorted(site.layer for site in choose(model, None, stack, "self"))
    chosen = layers[len(layers) // 2] if layer is None else layer
    with torch.enable_grad(), record(model, gradients=True, layers=[chosen], stack=stack, kind="self") as calls:
        logits = model(**inputs, use_cache=False).logits[:, -1]
        wanted = logits.amax(-1).sum()
        (gradient,) = torch.autograd.grad(wanted, [calls[0].output])
        calls[0].output.grad = gradient
    last = slice(image.shape[1] - 1, image.shape[1])
    with torch.no_grad():
        worth = (calls[0].weight_gradients(rows=last).relu() * calls[0].weights(rows=last)).mean(1)[:, 0]
    return worth[image].view(image.shape[0], side, side)


@steering(
    "agla",
    title="the whole picture and the part that the question is about",
    source="arXiv 2406.12718",
    kinds=("vision-language",),
    neutral={"alpha": 0.0, "beta": 0.0},
    strength="alpha",
    reach=(0.0, 4.0),
    towers=(
        "inputs",
        "logits",
    ),
)
def _open(
    model: Any, prompt: Prompt, *, alpha: float = 2.0, beta: float = 0.5, kept: float = 0.5
) -> AbstractContextManager[None]:
    """The local view: by Grad-CAM of the model's own attention, where the paper has BLIP's."""
    check_share("agla: kept", kept)
    local = local_view(prompt.inputs["pixel_values"], relevance_map(model, prompt.inputs), kept)
    return agla(model, local, alpha, beta=beta)
