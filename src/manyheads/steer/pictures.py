"""What interventions on models that read pictures share: where image tokens stand, and the same prompt without its
picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.sites import shows_pictures_to_text


def image_token(model: Any) -> int:
    """The id that stands in a prompt once for every token of the picture."""
    config = model.config
    if not shows_pictures_to_text(model):
        raise ValueError(f"{type(model).__name__} reads no pictures: its config names no image token")
    own = getattr(config, "image_token_id", None)
    return int(config.image_token_index if own is None else own)


def image_places(model: Any, inputs: Mapping[str, Any], who: str) -> Tensor:
    """[b, n] bool: the tokens of the picture in a prompt. ValueError where a row has none, or rows have different
    numbers of them."""
    ids = _ids(inputs, who)
    found = ids == image_token(model)
    counts = found.sum(-1).tolist()
    if not all(counts) or inputs.get("pixel_values") is None:
        raise ValueError(f"{who}: the prompt shows no picture: give pixel_values and a text with image tokens")
    if len(set(counts)) > 1:
        raise ValueError(f"{who}: the rows have {counts} image tokens; want as many in each")
    return found


def check_last(inputs: Mapping[str, Any], who: str) -> None:
    """The prompt's last place must be a real token in every row."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and (mask.dim() != 2 or not bool(mask[:, -1].all())):
        raise ValueError(f"{who}: pad on the left with a mask [b, n]: the answer begins behind the prompt's last place")


def same_rows(values: Tensor, batch: int, who: str) -> Tensor:
    """Rows of the prompt for a call whose batch holds each of them as often (beams)."""
    if batch % values.shape[0]:
        raise ValueError(f"{who}: the block was opened for {values.shape[0]} rows, a call has {batch}")
    return values if batch == values.shape[0] else values.repeat_interleave(batch // values.shape[0], 0)


def blind(model: Any, named: Mapping[str, Any], who: str, past: Any = None) -> dict[str, Any]:
    """The arguments of a call without the picture: its tokens are there and are seen by none, and positions are
    counted over the others, which is the prompt with the image tokens taken out, at the same places. past: the cache of
    what was read before, which remembers where pictures stood."""
    ids, token = _ids(named, who), image_token(model)
    images, length = ids == token, 0 if past is None else past.get_seq_length()
    if length:
        before = same_rows(past.manyheads_images, ids.shape[0], who)[:, :length]
        images = torch.cat([before, images], 1)
    if past is not None:
        past.manyheads_images = images
    mask = named.get("attention_mask")
    mask = torch.ones_like(images, dtype=torch.long) if mask is None else mask
    if mask.shape != images.shape:
        raise ValueError(f"{who}: attention_mask {list(mask.shape)} is not of {list(images.shape)} tokens read so far")
    mask = mask.long() * ~images
    found = {key: value for key, value in named.items() if not key.startswith(("pixel_values", "image_", "mm_"))}
    places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return {**found, "input_ids": ids.masked_fill(ids == token, 0), "attention_mask": mask, "position_ids": places}


def _ids(named: Mapping[str, Any], who: str) -> Tensor:
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"{who}: give input_ids [b, n]: embeddings do not tell where pictures stand")
    return ids
