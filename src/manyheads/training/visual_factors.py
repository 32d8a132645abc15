"""DARA: a learnt factor for every image on the scores of its tokens, the only thing that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.taps import tap


class VisualFactors(nn.Module):
    """Factors f that the first layers of a vision-language model read images through; at 1, the start, it is the model.

        A = softmax(mask(S F)),  S = scale Q K^T,  F = diag(f_1 .. f_m),  f_j = f_{layer, head, image of token j}, or 1
        of text

        model.requires_grad_(False)
        factors = VisualFactors(model, images=5)
        which = image_numbers(input_ids, model.config.image_token_id)       # [b, n], -1 for text
        with factors.on(model, which):
            loss = model(**inputs).loss
        loss.backward()

    factors: [layers, heads, images], one for each image of the prompt in its order (demonstrations, then the query);
    per_head=False: [layers, 1, images]. A score that is negative falls where its factor grows: adding log f would not
    do so, and is something else. A position bias (T5) comes after the factor, and is not scaled.

    Works with padding on either side, gradient checkpointing (the model's own, enabled before) and `generate`: what is
    behind `which` is text, and rows that are drawn out of one prompt read its images. Source: Chen et al., True
    Multimodal In-Context Learning Needs Attention to the Visual Context, arXiv:2507.15807 (its first layer; the paper
    speaks of about 100 parameters). Its code was not read; that heads have factors of their own is what its headline
    says. ValueError: more images in a row than factors, layers that the model has not, a shrunk cache.
    """

    def __init__(
        self,
        model: nn.Module,
        images: int,
        *,
        layers: Sequence[int] = (0,),
        per_head: bool = True,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        if images < 1:
            raise ValueError(f"VisualFactors: images={images}; want the most images that a prompt has, at least 1")
        self.layers, self.stack = tuple(dict.fromkeys(int(layer) for layer in layers)), text_stack(model, stack)
        sites = choose(model, self.layers, self.stack, "self")
        heads = _heads(model, sites[0].module) if per_head else 1
        self.factors = nn.Parameter(torch.ones(len(sites), heads, images))

    @contextmanager
    def on(self, model: nn.Module, which: Tensor) -> Iterator[None]:
        """While open, the model's chosen layers attend through the factors. which: [b, n] integers, the number of the
        image that a token is part of, from 0, and -1 elsewhere, padding included."""
        if which.dim() != 2 or not which.numel() or which.is_floating_point() or int(which.min()) < -1:
            raise ValueError(
                f"VisualFactors: which is {tuple(which.shape)} of {which.dtype}; want [batch, tokens], whole numbers "
                "from -1 (text), as image_numbers gives them"
            )
        has = self.factors.shape[2]
        if int(which.max()) >= has:
            raise ValueError(f"VisualFactors: a row has {int(which.max()) + 1} images, and there are factors for {has}")
        at = {layer: place for place, layer in enumerate(self.layers)}

        def reader(call: Any) -> Tensor:
            own = opened(call, "VisualFactors")
            scale = self._of_tokens(own, which.to(own.key.device), at[own.layer])
            return own.rescored(lambda scores, rows: scores * scale)

        with tap(model, reader, layers=self.layers, stack=self.stack, kind="self"):
            yield

    def _of_tokens(self, call: AttentionCall, which: Tensor, place: int) -> Tensor:
        """[b, heads or 1, 1, m]: the factors of the call's keys."""
        (rows, n), b, m = which.shape, len(call.key), call.key.shape[2]
        if m < n or b % rows or _has_slid(call):
            raise ValueError(
                f"VisualFactors: which names {rows} rows of {n} tokens, and {call.site.path} reads {b} rows of {m}: "
                "which must be of this batch, and the cache neither shrunk nor a sliding window's"
            )
        which = torch.nn.functional.pad(which.repeat_interleave(b // rows, 0), (0, m - n), value=-1)
        chosen = one_hot(which + 1, self.factors.shape[2] + 1)[..., 1:].to(self.factors.dtype)
        own = self.factors[place].to(chosen.device)
        return 1 + torch.einsum("hi,bmi->bhm", own - 1, chosen)[:, :, None]


def _has_slid(call: AttentionCall) -> bool:
    """Whether the call's cache is one that lets go of its first keys, and is full."""
    module: Any = call.site.module
    config = getattr(module, "config", None)
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return isinstance(window, int) and call.query.shape[2] < call.key.shape[2] and call.key.shape[2] >= window > 0


def image_numbers(input_ids: Tensor, image_token: int, tokens_per_image: int | None = None) -> Tensor:
    """[b, n]: which image of its row a token is part of, from 0; -1 for all others. An image is a stretch of image
    tokens or, where images stand side by side, so many of them; ValueError where they do not divide."""
    image = input_ids == image_token
    if tokens_per_image is None:
        begins = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
        number = begins.cumsum(1) - 1
    else:
        counts = image.sum(1)
        if tokens_per_image < 1 or bool((counts % tokens_per_image != 0).any()):
            raise ValueError(
                f"image_numbers: rows have {counts.tolist()} image tokens, not {tokens_per_image} an image"
            )
        number = (image.cumsum(1) - 1) // tokens_per_image
    return number.masked_fill(~image, -1)


def _heads(model: nn.Module, module: Any) -> int:
    """The query heads of an attention layer."""
    config = getattr(module, "config", None)
    found = getattr(config, "num_attention_heads", None) or getattr(module, "heads", None)
    if not isinstance(found, int):
        raise ValueError(
            f"VisualFactors: {type(module).__name__} of {type(model).__name__} does not say how many heads it has: "
            "per_head=False shares a factor between them"
        )
    return found
