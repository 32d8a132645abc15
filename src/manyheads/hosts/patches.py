"""Which of a vision model's tokens are patches of the picture, found by measuring and not by the family's name.

Class, register, distillation and detection tokens stand before or after the patches, as many as a family likes.
Patches are given noise, a half of all at a time and its complement, once for each bit of their number: the bits in
which a token of the first layer moves are the number of its patch. Only a grid in rows, one token to a patch, is
accepted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.device import evaluating
from manyheads.hosts.sites import Site, sites


@dataclass(frozen=True)
class Patches:
    """rows x columns of patches, each `size` pixels (height, width), in rows from token `first` on, of `tokens`."""

    first: int
    rows: int
    columns: int
    tokens: int
    size: tuple[int, int]

    @property
    def stop(self) -> int:
        return self.first + self.rows * self.columns

    def grid(self, values: Tensor) -> Tensor:
        """[..., tokens] -> [..., rows, columns]: without the tokens that are no patches."""
        if values.shape[-1] != self.tokens:
            raise ValueError(
                f"values {list(values.shape)} are not of this picture's {self.tokens} tokens, {self.rows} x "
                f"{self.columns} patches among them"
            )
        return values[..., self.first : self.stop].unflatten(-1, (self.rows, self.columns))

    def sequence(self, grid: Tensor) -> Tensor:
        """[..., rows, columns] -> [..., tokens], 0 elsewhere."""
        return nn.functional.pad(grid.flatten(-2), (self.first, self.tokens - self.stop))

    def pixels(self, grid: Tensor) -> Tensor:
        """[..., rows, columns] -> [..., height, width] of what the patches cover."""
        high, wide = self.size
        return grid.repeat_interleave(high, -2).repeat_interleave(wide, -1)


class _Seen(Exception):
    """The first attention was reached."""


def find_patches(model: nn.Module, pixels: Tensor, **options: Any) -> Patches:
    """The patches of pixels [b, channels, height, width] among the tokens of the model's vision stack.

    options: what else the model's forward was given (those that its vision part takes count). ValueError where pixels
    are of another shape (videos, flattened patches), the patch size is not known, or tokens are not one to a patch in
    rows: windows, overlapping patches, patches in another order, several pictures in one row of tokens.
    """
    name = type(model).__name__
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or 0 in pixels.shape:
        shape = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"{name}: pixel_values are {shape}; patches are known of [b, channels, height, width] alone")
    tower, own = _tower(model)
    high, wide = _patch_size(tower, model)
    rows, columns = pixels.shape[2] // high, pixels.shape[3] // wide
    if not rows or not columns:
        raise ValueError(f"{name}: a picture of {list(pixels.shape[2:])} pixels has no patch of {high} x {wide}")
    options = {key: value for key, value in options.items() if _takes(tower, key) and key != "pixel_values"}

    def tokens(given: Tensor) -> Tensor:
        return _first_tokens(tower, own, given, options)

    two = tokens(pixels[:2])
    if two.dim() != 3 or two.shape[0] != pixels[:2].shape[0]:
        raise ValueError(f"{name}: its tokens {list(two.shape)} are not [b, n, e] of {list(pixels[:2].shape)} pixels")
    found = Patches(-1, rows, columns, two.shape[1], (high, wide))
    numbers = _numbers(tokens, pixels[:1], found)
    at = (numbers >= 0).nonzero()[:, 0].tolist()
    expected = list(range(rows * columns))
    if numbers[at].tolist() != expected or at != list(range(at[0], at[0] + len(expected))):
        raise ValueError(
            f"{name}: its {found.tokens} tokens are not one for each of {rows} x {columns} patches, in rows: which "
            "token is which patch is not known"
        )
    return Patches(at[0], rows, columns, found.tokens, found.size)


def _tower(model: nn.Module) -> tuple[nn.Module, list[Site]]:
    """The smallest part that makes pixels into tokens which attend, and where they do."""
    every = sites(model)
    own = [site for site in every if site.stack == "vision"] or every
    parts = own[0].path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if _takes(module, "pixel_values"):
            return module, own
    raise ValueError(f"{type(model).__name__} takes no pixel_values: it has no patches")


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _patch_size(tower: nn.Module, model: nn.Module) -> tuple[int, int]:
    config: Any = getattr(tower, "config", None) or getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ValueError(f"{type(model).__name__} has patch_size={size!r} in its config: no grid of patches is known")


def _first_tokens(tower: nn.Module, own: list[Site], pixels: Tensor, options: dict[str, Any]) -> Tensor:
    """What the first attention reads. Nothing behind it is computed; random numbers are the same each time."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Seen

    with ExitStack() as stack, torch.no_grad(), evaluating(tower), suppress(_Seen):
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        for site in own:
            stack.callback(site.module.register_forward_pre_hook(stop, with_kwargs=True).remove)
        tower(pixel_values=pixels, **options)
    if not seen:
        raise ValueError(f"{type(tower).__name__} ran without attending to its pixels")
    return seen[0]


def _numbers(tokens: Callable[[Tensor], Tensor], pixels: Tensor, layout: Patches) -> Tensor:
    """[tokens]: which patch each token is of; -1 for none, -2 for none or several that do not agree."""
    count = layout.rows * layout.columns
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels) * (1 + pixels.std())
    before = tokens(pixels)

    def moved(patches: Tensor) -> Tensor:
        where = layout.pixels(patches.view(layout.rows, layout.columns)).to(pixels)
        high, wide = where.shape
        changed = pixels.clone()
        changed[..., :high, :wide] += noise[..., :high, :wide] * where
        size = (tokens(changed) - before)[0].float().norm(dim=-1)
        return size > 1e-3 * size.max().clamp_min(1e-30)

    numbers = torch.arange(count, device=pixels.device)
    patch = torch.where(moved(torch.ones_like(numbers, dtype=torch.bool)), 0, -1)
    for bit in range((count - 1).bit_length()):
        has = (numbers >> bit & 1).bool()
        one, zero = moved(has), moved(~has)
        agree = (one ^ zero) & (patch >= 0)
        patch = torch.where(agree, patch + (one.long() << bit), torch.where(patch == -1, patch, -2))
        patch = torch.where((patch == -1) & (one | zero), -2, patch)
    # Places that do not agree stand in the way of a grid like any strange number.
    return torch.where(patch == -2, count, patch)
