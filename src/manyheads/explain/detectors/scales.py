"""Visual heads over models: how many there are, how they concentrate, and whether that grows with the models' size.

    visual score of a head    mean mass on the image's tokens, and how concentrated it is (`detect`: visual,
                              visual-concentration)
    share                     heads whose mass is above the image's share of the tokens that a query sees, by chance
    correlation               Spearman's, of a figure with the number of parameters over the models
Claim: some heads of language models attend to visual tokens, in every model and at every size (Bi et al., arXiv
2412.18108). The line at chance, in place of a chosen one, is this file's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.detectors.detect import detect
from manyheads.hosts.loading import Loaded


@dataclass(frozen=True)
class Scale:
    """One model: its parameters, mass and concentration [layers, heads], chance: the image's share of all tokens."""

    name: str
    parameters: int
    mass: Tensor
    concentration: Tensor
    chance: float

    @property
    def share(self) -> float:
        """Of heads above chance."""
        known = self.mass[~self.mass.isnan()]
        return float((known > self.chance).double().mean())

    @property
    def layers(self) -> Tensor:
        """[layers]: the mean mass of their heads."""
        return self.mass.nanmean(1)

    @property
    def figures(self) -> dict[str, float]:
        return {
            "parameters": float(self.parameters),
            "share": self.share,
            "mass": float(self.mass.nanmean()),
            "most": float(self.mass[~self.mass.isnan()].max()),
            "concentration": float(self.concentration.nanmean()),
        }


def visual_over_scales(
    models: Mapping[str, tuple[nn.Module | Loaded, Any]], *, image_span: Sequence[int] | None = None
) -> list[Scale]:
    """models: name -> (model, inputs with an image, as `detect` takes them); smallest first. image_span: as in
    `detect`, the same for all, where no config names an image token."""
    if not models:
        raise ValueError("there are no models to compare: give name -> (model, inputs)")
    found = []
    for name, (model, inputs) in models.items():
        table = detect(model, ["visual", "visual-concentration"], inputs, image_span=image_span)
        module: Any = model.model if isinstance(model, Loaded) else model
        found.append(Scale(name, sum(own.numel() for own in module.parameters()), table["visual"],
                           table["visual-concentration"], _chance(module, inputs, image_span)))  # fmt: skip
    return sorted(found, key=lambda own: own.parameters)


def _chance(model: Any, inputs: Any, span: Sequence[int] | None) -> float:
    """The image's share of the tokens, the mean over rows, padding left out."""
    ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if span is not None:
        return float(((span[1] - span[0]) / real.sum(-1).double()).mean())
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    return float((((ids == token) & real).sum(-1) / real.sum(-1)).double().mean())


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; 0 where one of the two is constant."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values: want as many of both, two or more")
    one, two = (_ranks(torch.tensor(list(own), dtype=torch.float64)) for own in (x, y))
    one, two = one - one.mean(), two - two.mean()
    size = float(one.norm() * two.norm())
    return float(one @ two) / size if size else 0.0


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    same = (values[None] == values[:, None]).sum(1)
    return below.double() + (same.double() - 1) / 2


def scale_correlations(scales: Sequence[Scale]) -> dict[str, float]:
    """Each figure's rank correlation with the number of parameters; two models or more."""
    size = [own.figures["parameters"] for own in scales]
    names = [name for name in scales[0].figures if name != "parameters"] if scales else []
    return {name: rank_correlation(size, [own.figures[name] for own in scales]) for name in names}
