"""Habits of people who draw: one caption as a string, half precision, one change inside of another."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from manyheads.hosts.loading import load_model
from manyheads.steer.diffusion import box_mask, edit_words, merge_concepts, regional_prompts, space_time, until


@cache
def drawer(name: str, kind: torch.dtype = torch.float32) -> Any:
    return load_model(name).model.to(kind)


def halves(model: Any) -> torch.Tensor:
    return torch.stack([box_mask(model, (4, 0, 12, 8)), box_mask(model, (4, 8, 12, 16))])


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_one_caption_by_itself_is_one_picture(name: str) -> None:
    model = drawer(name)
    wanted = model.sample(["a 3 and a 7"], steps=2)
    assert torch.equal(model.sample("a 3 and a 7", steps=2), wanted)
    assert torch.equal(model.encode("a 7")[0], model.encode(["a 7"])[0])
    assert torch.equal(model.invert(wanted, "a 7", steps=2), model.invert(wanted, ["a 7"], steps=2))
    with pytest.raises(ValueError, match="1 captions and 2 masks"), regional_prompts(model, "37", halves(model)):
        pass
    with pytest.raises(ValueError, match="1 captions of 2 pictures"):
        model.invert(wanted.expand(2, -1, -1, -1), "a 7", steps=2)
    with pytest.raises(ValueError, match="finite"):
        model.sample(["a 3"], steps=2, guidance=float("nan"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_half_precision_draws(name: str, kind: torch.dtype) -> None:
    model = drawer(name, kind)
    masks = halves(model)
    for opened, captions in (
        (regional_prompts(model, ["a 3", "a 7"], masks), ["a 3 and a 7"]),
        (space_time(model, ["a 3"], [(0.5, 0.25)], 0.5), ["a 3 and a 7"]),
        (merge_concepts(model, 0, {1: masks[0]}), ["a 3 and a 7", "a 5"]),
        (edit_words(model, [2], times=0.0), ["a 3 and a 7"]),
    ):
        plain = model.sample(captions, steps=2)[:1]
        with opened:
            found = model.sample(captions, steps=2)[:1]
        assert found.dtype == kind
        assert bool(found.isfinite().all())
        assert not torch.equal(found, plain)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_change_inside_of_another_reads_its_words_undisturbed(name: str) -> None:
    model, masks = drawer(name), halves(drawer(name))
    with regional_prompts(model, ["a 3", "a 7"], masks, active=until(0.5, 4)):
        alone = model.sample(["a 3 and a 7"], steps=4)
    for outer in (
        regional_prompts(model, ["a 5", "a 1"], masks, active=until(0.5, 4)),
        edit_words(model, [2], times=0.0, active=until(0.5, 4)),
        space_time(model, ["a 5"], [(0.5, 0.5)], 0.5, active=until(0.5, 4)),
    ):
        with outer, regional_prompts(model, ["a 3", "a 7"], masks, active=until(0.5, 4)):
            assert bool(model.sample(["a 3 and a 7"], steps=4).isfinite().all())
    with regional_prompts(model, ["a 3", "a 7"], masks, active=until(0.5, 4)):
        assert_close(model.sample(["a 3 and a 7"], steps=4), alone, atol=0, rtol=0)
