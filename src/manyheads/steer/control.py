"""ControlMLLM: a region of the picture pointed at, by a latent that pulls attention there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import given_cache
from manyheads.hosts.calls import opened
from manyheads.hosts.sites import text_stack
from manyheads.hosts.switching import uncompiled
from manyheads.hosts.taps import tap
from manyheads.runs.given import shown
from manyheads.steer.common import check_share
from manyheads.steer.method import Prompt, steering
from manyheads.steer.pictures import check_last, image_places, same_rows


@contextmanager
def control(
    model: Any,
    inputs: Mapping[str, Any],
    region: Tensor,
    *,
    steps: int = 5,
    lr: float = 1.0,
    alpha: float = 400.0,
    beta: float = 0.5,
) -> Iterator[list[float]]:
    """Claim: a box drawn on the picture becomes part of the question, with no training, by optimising what is added to
    the image tokens.

    p [b, image tokens, dim] = 0 is added to the image's embeddings; in each step a, the attention of the text behind it
    on these tokens (mean over layers, heads and rows), gives E = alpha (1 - sum_j a_j M_j / sum_j a_j)^2, and
    p <- p - lr dE/dp; what is used is the running mean p_use <- beta p + (1 - beta) p_use. A row stops early once its E
    has fallen to three quarters of its first. In the block p_use is added wherever the prompt's picture is read; gives
    E of every step, summed over rows. region: M, [b or 1, image tokens] in [0, 1], as by `box_region`. steps 0, lr 0
    and a region that is everything change nothing.
    Source: arXiv 2407.21534, mrwu-mac/ControlMLLM `compute_ca_loss`, for boxes and masks. The released script adds
    every step's p_use on top of the last; here, as in the paper, there is one latent. Its points and scribbles use a
    density above 1, which can push attention away: left out.
    """
    check_share("control: beta", beta)
    if steps < 0 or not lr >= 0 or not alpha >= 0:
        raise ValueError(f"control: want steps, lr and alpha of at least 0; got {steps}, {lr:g}, {alpha:g}")
    image = image_places(model, inputs, "control")
    check_last(inputs, "control")
    count = int(image[0].sum())
    if region.dim() != 2 or region.shape[0] not in (1, image.shape[0]) or region.shape[1] != count:
        raise ValueError(f"control: region {list(region.shape)} is not [rows, {count} image tokens]")
    if not bool(((region >= 0) & (region <= 1)).all()) or not bool((region.sum(-1) > 0).all()):
        raise ValueError("control: a region lies between 0 and 1 and holds some of the picture")
    latent, energies = _optimised(model, inputs, image, region.float(), steps, lr, alpha, beta)
    with _added(model, image, latent):
        yield energies


def _optimised(
    model: Any,
    inputs: Mapping[str, Any],
    image: Tensor,
    region: Tensor,
    steps: int,
    lr: float,
    alpha: float,
    beta: float,
) -> tuple[Tensor, list[float]]:
    width = model.config.get_text_config(decoder=True).hidden_size
    parameter = next(model.parameters())
    used = torch.zeros(int(image.sum()), width, device=parameter.device, dtype=torch.float32)
    latent, energies, first = used.clone(), list[float](), torch.zeros(0)
    with ExitStack() as left, torch.enable_grad():
        for own in [each for each in model.parameters() if each.requires_grad]:
            left.callback(own.requires_grad_, True)
            own.requires_grad_(False)
        row = torch.arange(len(image), device=used.device).repeat_interleave(image.sum(-1).to(used.device))[:, None]
        for step in range(steps):
            probe = used.clone().requires_grad_()
            energy = _energy(model, inputs, image, region, probe, alpha)
            energies.append(float(energy.detach().sum()))
            first = energy.detach() if not step else first
            # A row stops on its own, whatever stands beside it in the batch.
            done = (energy.detach() <= 0.75 * first) & (step > 0)
            if bool(done.all()):
                break
            (gradient,) = torch.autograd.grad(energy.sum(), [probe])
            latent = latent - lr * gradient
            used = torch.where(done[row], used, beta * latent + (1 - beta) * used)
    return used.detach(), energies


def _energy(
    model: Any, inputs: Mapping[str, Any], image: Tensor, region: Tensor, latent: Tensor, alpha: float
) -> Tensor:
    """[b], of each row: their gradients do not mix."""
    shares: list[Tensor] = []
    places = torch.arange(image.shape[1], device=image.device)
    last = (image * (places + 1)).amax(-1, keepdim=True)
    mask = inputs.get("attention_mask")
    text = (places >= last) if mask is None else (places >= last) & mask.bool()

    def reader(call: Any) -> None:
        own = opened(call, "control")
        start = int(last.min())
        rows = slice(start, image.shape[1])
        weights = own.weights(rows=rows).mean(1)  # [b, rows, m]
        chosen = text[:, rows].to(weights)
        mean = (weights * chosen[..., None]).sum(1) / chosen.sum(1).clamp_min(1)[:, None]
        shares.append(mean[image].view(image.shape[0], -1))

    with _added(model, image, latent), tap(model, reader, stack=text_stack(model), kind="self"):
        model(**inputs, use_cache=False)
    attention = torch.stack(shares).mean(0)
    act = (attention * region.to(attention)).sum(-1) / attention.sum(-1)
    return alpha * (1 - act).pow(2)


@contextmanager
def _added(model: Any, image: Tensor, latent: Tensor) -> Iterator[None]:
    """latent [image tokens of all rows, dim] on top of the embeddings of the prompt's picture."""
    length = image.shape[1]
    rows = latent.new_zeros(*image.shape, latent.shape[-1]).masked_scatter(image[..., None], latent)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("inputs_embeds")
        past = given_cache(kwargs)
        begun = 0 if past is None else past.get_seq_length()
        if given is None or begun >= length:
            return args, kwargs
        if begun or given.shape[1] < length:
            raise ValueError(f"control: the prompt's {length} tokens must be read in one pass; got {given.shape[1]}")
        own = same_rows(rows, given.shape[0], "control")
        more = torch.nn.functional.pad(own, (0, 0, 0, given.shape[1] - length))
        return args, {**kwargs, "inputs_embeds": given + more.to(given)}

    hook = _text_part(model).register_forward_pre_hook(before, with_kwargs=True)
    try:
        with uncompiled():
            yield
    finally:
        hook.remove()


def _text_part(model: Any) -> Any:
    """What is fed the embeddings of pictures and words in one row."""
    found = next((module for name, module in model.named_modules() if name.split(".")[-1] == "language_model"), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no language_model that reads pictures as embeddings")
    return found


def box_region(text: str, rows: int, columns: int) -> Tensor:
    """'left,top,right,bottom' in shares of the picture from 0 to 1 -> [1, rows * columns], 1 at patches whose middle
    lies inside. ValueError for a box outside the picture, and for one between the patches."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"box {shown(text)!r}: want left,top,right,bottom, each from 0 to 1") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"box {shown(text)!r} does not lie in the picture: want 0 <= left < right <= 1, top < bottom")
    down, across = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    inside = ((down >= top) & (down < bottom))[:, None] & ((across >= left) & (across < right))
    if not bool(inside.any()):
        raise ValueError(f"box {shown(text)!r} holds the middle of none of {rows} x {columns} patches: make it larger")
    return inside.float().view(1, -1)


@steering(
    "control",
    title="a box of the picture pointed at",
    source="arXiv 2407.21534",
    kinds=("vision-language",),
    neutral={"lr": 0.0},
    strength="lr",
    reach=(0.0, 4.0),
    towers=("inputs",),
)
def _open(
    model: Any,
    prompt: Prompt,
    *,
    box: str = "0,0,0.5,0.5",
    steps: int = 5,
    lr: float = 1.0,
    alpha: float = 400.0,
    beta: float = 0.5,
) -> AbstractContextManager[list[float]]:
    count = int(image_places(model, prompt.inputs, "control")[0].sum())
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"control: {count} image tokens are no square of patches; give a region from Python")
    region = box_region(box, side, side).to(prompt.inputs["input_ids"].device)
    return control(model, prompt.inputs, region, steps=steps, lr=lr, alpha=alpha, beta=beta)
