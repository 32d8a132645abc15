"""NVLM's tile tags: words before each tile of a picture say which one it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tagged_tiles(
    rows: Sequence[Sequence[int]], image_token: int, tags: Sequence[Sequence[int]], tile: int, pad: int = 0
) -> dict[str, Tensor]:
    """Claim: a decoder tells the tiles of a picture apart, and puts them together, by words that name them.

    Before the k-th tile of each picture (each `tile` image tokens of a run) stand the ids tags[k], such as those of
    "<tile_1>"; the words are the model's own, none is trained. rows: ids of each prompt. Gives input_ids and
    attention_mask [b, n], padded on the left. Pictures whose tokens are no whole number of tiles, and those of more
    tiles than there are tags: ValueError. tags of no ids at all leave the rows as they are.
    Source: arXiv 2409.11402 (NVLM-D and NVLM-H), from the paper's description; no training code was released. The
    thumbnail, which comes first, can be given a tag of its own as tags[0].
    """
    made = [_tagged([int(own) for own in row], image_token, tags, tile) for row in rows]
    width = max(map(len, made))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in made])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in made])
    return {"input_ids": ids, "attention_mask": mask}


def _tagged(row: list[int], image_token: int, tags: Sequence[Sequence[int]], tile: int) -> list[int]:
    found: list[int] = []
    run = 0
    for place, own in enumerate(row):
        if own != image_token:
            run = 0
        else:
            number, within = divmod(run, tile)
            if within == 0:
                if number >= len(tags):
                    raise ValueError(f"tagged_tiles: a picture has more than {len(tags)} tiles of {tile} image tokens")
                found += tags[number]
            run += 1
            if run % tile and (place + 1 == len(row) or row[place + 1] != image_token):
                raise ValueError(f"tagged_tiles: a picture of {run} image tokens is no whole number of tiles of {tile}")
        found.append(own)
    return found


def tile_mask(ids: Tensor, tags: Sequence[Sequence[int]], tile: int) -> Tensor:
    """[b, 1, n, len(tags) tile] bool for cross attention (`gated-cross`) whose context is the tiles end to end: words
    that tag a tile see that tile alone, all other words all of them. ids [b, n]; where one tag begins another, the
    longer counts."""
    b, n = ids.shape
    seen = torch.ones(b, 1, n, len(tags) * tile, dtype=torch.bool, device=ids.device)
    for number, tag in sorted(enumerate(tags), key=lambda pair: len(pair[1])):
        want = torch.tensor(list(tag), device=ids.device)
        if not len(want) or len(want) > n:
            continue
        for row, place in (ids.unfold(1, len(want), 1) == want).all(-1).nonzero().tolist():
            seen[row, 0, place : place + len(want)] = False
            seen[row, 0, place : place + len(want), number * tile : (number + 1) * tile] = True
    return seen
