"""Train the small diffusion transformer that draws two digits from a caption: `dit.py --out DIR`; see `drawing.py`."""

from __future__ import annotations

from dataclasses import dataclass

from drawing import Training, train

from manyheads.models import DiffusionConfig, DiffusionTransformer
from manyheads.tasks.two_digits import WORDS


@dataclass(frozen=True)
class Recipe(Training):
    dim: int = 64
    layers: int = 4
    heads: int = 4
    mlp: int = 192


def make(recipe: Recipe) -> DiffusionTransformer:
    return DiffusionTransformer(
        DiffusionConfig(
            words=WORDS,
            hidden_size=recipe.dim,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=recipe.mlp,
        )
    )


def inner(name: str) -> bool:
    return name.startswith("layers") and "modulation" not in name


if __name__ == "__main__":
    train(Recipe, make, inner, "Train the small text-to-image diffusion transformer.")
