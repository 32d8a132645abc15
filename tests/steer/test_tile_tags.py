"""NVLM's tile tags: where they are put, what they see, and that a model still finds its image tokens."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from vision_hosts import IMAGE, llava

from manyheads.registry import create_attention
from manyheads.steer.tile_tags import tagged_tiles, tile_mask

TAGS = [[20, 1], [20, 2], [20, 3]]


def test_each_tile_has_its_tag_before_it() -> None:
    rows = [[5, *[IMAGE] * 9, 6], [IMAGE] * 6, [7, IMAGE, IMAGE, IMAGE, 8, IMAGE, IMAGE, IMAGE]]
    made = tagged_tiles(rows, IMAGE, TAGS, 3)
    i = IMAGE
    wanted = [
        [5, 20, 1, i, i, i, 20, 2, i, i, i, 20, 3, i, i, i, 6],
        [0] * 7 + [20, 1, i, i, i, 20, 2, i, i, i],
        [0] * 5 + [7, 20, 1, i, i, i, 8, 20, 1, i, i, i],
    ]
    assert made["input_ids"].tolist() == wanted
    assert made["attention_mask"].tolist() == [[int(own != 0) for own in row] for row in wanted]
    assert tagged_tiles(rows[:1], IMAGE, [[]] * 3, 3)["input_ids"].tolist() == rows[:1]
    model = llava()
    with torch.no_grad():
        pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
        assert model(**tagged_tiles(rows[:1], IMAGE, TAGS, 3), pixel_values=pixels).logits.shape == (1, 17, 61)


def test_a_tag_sees_its_tile_and_words_see_all() -> None:
    ids = torch.tensor([[5, 20, 1, 7, 20, 2, 9], [20, 3, 5, 5, 5, 5, 20]])
    mask = tile_mask(ids, TAGS, 2)
    for b, row in enumerate([[None, 0, 0, None, 1, 1, None], [2, 2, None, None, None, None, None]]):
        for place, number in enumerate(row):
            wanted = [number in (None, j // 2) for j in range(6)]
            assert mask[b, 0, place].tolist() == wanted
    torch.manual_seed(0)
    cross = create_attention("gated-cross", 16, 2).double()
    cross.gate.data.fill_(1.0)
    x, tiles = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    found = cross(x, tiles, mask=mask).output
    assert_close(found[0, 4:6], cross(x[:1, 4:6], tiles[:1, 2:4]).output[0])
    assert_close(found[0, 3:4], cross(x[:1, 3:4], tiles[:1]).output[0])


def test_the_longer_tag_counts() -> None:
    mask = tile_mask(torch.tensor([[20, 1, 4]]), [[20, 1, 4], [20, 1]], 1)
    assert mask[0, 0].tolist() == [[True, False]] * 3


def test_pictures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 tiles"):
        tagged_tiles([[IMAGE] * 12], IMAGE, TAGS, 3)
    for row in ([IMAGE] * 4, [IMAGE] * 4 + [5]):
        with pytest.raises(ValueError, match="no whole number"):
            tagged_tiles([row], IMAGE, TAGS, 3)
