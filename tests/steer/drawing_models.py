"""A tiny diffusion transformer, a tiny UNet, and what attention did before an intervention and after it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.taps import record
from manyheads.models import DiffusionConfig, DiffusionTransformer, DiffusionUNet, UNetConfig
from manyheads.models.flow import Step
from manyheads.tasks.two_digits import WORDS

CAPTIONS = ["a 3 left of a 7", "a 2", "a 5 above a 1"]


def tiny() -> DiffusionTransformer:
    torch.manual_seed(0)
    config = DiffusionConfig(
        words=WORDS,
        image_size=8,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        frequencies=4,
    )
    return drawn_anew(DiffusionTransformer(config))


def tiny_unet() -> DiffusionUNet:
    """8 x 8 tokens on the way down, 4 x 4 below them three times, and 8 x 8 again."""
    torch.manual_seed(1)
    config = UNetConfig(
        words=WORDS, image_size=8, widths=[8, 8], attention_sides=[8, 4], num_attention_heads=2, frequencies=4
    )
    return drawn_anew(DiffusionUNet(config))


def drawn_anew(model: Any) -> Any:
    """With parts that begin at zero doing something too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval().double()


def small_layer(model: Any) -> int:
    """The first layer that attends over 4 x 4 tokens."""
    return {"manyheads_diffusion": 0, "manyheads_unet": 1}[model.config.model_type]


def features_of(model: Any) -> torch.nn.Module:
    """A residual branch before it is added."""
    return model.layers[0].down if hasattr(model, "layers") else model.up[0].residual.second


def read_words(model: Any, caption: str) -> tuple[Tensor, Tensor]:
    """Keys and values [h, m, d] of a caption at that layer, by hand."""
    ids, _ = model.encode([caption])
    words = model.words(ids) + model.word_places[: ids.shape[1]]
    if hasattr(model, "layers"):
        cross = model.layers[0].cross_attention
    else:
        words, cross = model.down[1].attention.words(words), model.down[1].attention.cross_attention
    key, value = (own(words)[0].unflatten(-1, (2, 4)).transpose(0, 1) for own in (cross.k_proj, cross.v_proj))
    return key.detach(), value.detach()


def before_and_after(
    model: Any,
    change: AbstractContextManager[Any],
    kind: str,
    captions: Sequence[str] = CAPTIONS,
    index: int = 0,
) -> tuple[Any, Any]:
    """The call of the kind at 4 x 4 tokens, as the model makes it and as the intervention leaves it, in one pass of a
    guided step of 4; rows 0 to b - 1 read no caption."""
    ids, mask = model.encode(["" for _ in captions] + list(captions))
    count = len(captions)
    step = Step(index, 4, 1 - index / 4, 0.75 - index / 4, ids[count:], mask[count:], True)
    x = torch.randn(count, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with (
        torch.no_grad(),
        record(model, kind=kind, layers=[small_layer(model)]) as before,
        change,
        record(model, kind=kind, layers=[small_layer(model)]) as after,
        model.told(step),
    ):
        model.velocities(torch.cat([x, x]), step.time, ids, mask)
    return before[-1], after[-1]
