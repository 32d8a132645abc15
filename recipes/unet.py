"""Train the small UNet that draws two digits from a caption: `unet.py --out DIR`; see `drawing.py`."""

from __future__ import annotations

from dataclasses import dataclass

from drawing import Training, train

from manyheads.models import DiffusionUNet, UNetConfig
from manyheads.tasks.two_digits import WORDS


@dataclass(frozen=True)
class Recipe(Training):
    """narrow: the width at full size; wide: of the levels below, which attend."""

    batch: int = 32
    narrow: int = 32
    wide: int = 64
    heads: int = 4


def make(recipe: Recipe) -> DiffusionUNet:
    widths = [recipe.narrow, recipe.wide, recipe.wide]
    return DiffusionUNet(UNetConfig(words=WORDS, widths=widths, num_attention_heads=recipe.heads))


def inner(name: str) -> bool:
    """Attention and its MLP; convolutions and what reads the time are AdamW's."""
    return ".attention." in name


if __name__ == "__main__":
    train(Recipe, make, inner, "Train the small text-to-image UNet.")
