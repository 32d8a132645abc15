"""The diffusion transformer: shapes, sampling, saving, and what taps see of it."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from manyheads.hosts.sites import sites
from manyheads.hosts.taps import record
from manyheads.models import DiffusionConfig, DiffusionTransformer
from manyheads.tasks.two_digits import WORDS

CAPTIONS = ["a 3 left of a 7", "a 2"]


def tiny() -> DiffusionTransformer:
    """Two layers, drawn at random in full: what begins at zero would hide most of it."""
    torch.manual_seed(0)
    config = DiffusionConfig(
        words=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, frequencies=4
    )
    model = DiffusionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_it_begins_by_predicting_nothing() -> None:
    model = DiffusionTransformer(tiny().config)
    ids, mask = model.encode(CAPTIONS)
    assert_close(model(torch.randn(2, 1, 16, 16), torch.rand(2), ids, mask).velocity, torch.zeros(2, 1, 16, 16))


def test_cut_and_joined_are_inverse_and_go_row_by_row() -> None:
    model, pictures = tiny(), torch.randn(2, 1, 16, 16)
    patches = model.cut(pictures)
    assert_close(patches[1, 9], pictures[1, 0, 2:4, 2:4].flatten())
    assert_close(model.joined(patches), pictures)


def test_a_sample_is_of_its_seed_and_its_caption_alone() -> None:
    model = tiny()
    whole = model.sample(CAPTIONS, steps=3, seed=5)
    assert torch.equal(whole, model.sample(CAPTIONS, steps=3, seed=5))
    assert_close(model.sample(CAPTIONS[:1], steps=3, seed=5), whole[:1], atol=1e-5, rtol=1e-4)
    assert (model.sample(CAPTIONS, steps=3, seed=6) - whole).abs().max() > 0.1
    assert (model.sample(["a 5 left of a 7", "a 2"], steps=3, seed=5) - whole)[0].abs().max() > 1e-3


def test_sampling_is_euler_on_guided_velocities() -> None:
    model, x = tiny().double(), torch.randn(2, 1, 16, 16, dtype=torch.double)
    (ids, mask), (none, nothing) = model.encode(CAPTIONS), model.encode(["", ""])
    found, y = model.sample(CAPTIONS, steps=4, guidance=3.0, noise=x), x
    for index in range(4):
        t = torch.full((2,), 1 - index / 4)
        with torch.no_grad():
            v, v0 = model(y, t, ids, mask).velocity, model(y, t, none, nothing).velocity
        y = y - (v0 + 3 * (v - v0)) / 4
    assert_close(found, y)


def test_guidance_of_one_is_the_captions_own() -> None:
    model = tiny().double()
    alone, close = (model.sample(CAPTIONS, steps=3, guidance=g) for g in (1.0, 1 + 1e-12))
    assert_close(alone, close)


def test_every_step_is_told_and_none_is_left_behind() -> None:
    model, seen = tiny(), []

    def watch(pictures: torch.Tensor, step: object) -> torch.Tensor:
        assert model.step is step
        seen.append((step.index, step.count, step.time, step.after, step.conditional, step.captions))
        if len(seen) == 3:
            raise RuntimeError("stop")
        return pictures

    with pytest.raises(RuntimeError, match="stop"):
        model.sample(CAPTIONS, steps=4, watch=watch)
    assert seen == [(i, 4, 1 - i / 4, 1 - (i + 1) / 4, slice(2, 4), 2) for i in range(3)]
    assert model.step is None


def test_a_flow_of_one_velocity_inverts_exactly_and_held_pictures_follow_their_way() -> None:
    model, pictures = tiny().double(), torch.randn(1, 1, 16, 16, dtype=torch.double)
    way = model.invert(pictures, CAPTIONS[:1], steps=30)
    assert_close(way[-1], pictures)
    again = model.sample(CAPTIONS[:1], steps=30, guidance=1.0, noise=way[0])
    assert (again - pictures).abs().max() < 0.2 * (way[0] - pictures).abs().max()
    straight = model.noised(pictures, steps=4, seed=1)
    assert_close(straight[1], 0.25 * pictures + 0.75 * straight[0])
    assert_close(model.sample(CAPTIONS, steps=4, held=straight)[1:], pictures)


def test_it_comes_back_from_its_folder_and_by_the_auto_class(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = tiny()
    model.save_pretrained(tmp_path)
    for cls in (DiffusionTransformer, AutoModel):
        again = cls.from_pretrained(tmp_path)
        assert torch.equal(again.sample(CAPTIONS, steps=2), model.sample(CAPTIONS, steps=2))


def test_taps_see_both_kinds_and_maps_are_shares_of_one() -> None:
    model = tiny()
    assert [(s.kind, s.layer, s.stack) for s in sites(model)] == [
        ("self", 0, "encoder"),
        ("cross", 0, "encoder"),
        ("self", 1, "encoder"),
        ("cross", 1, "encoder"),
    ]
    ids, mask = model.encode(CAPTIONS)
    with torch.no_grad(), record(model, kind="cross") as calls:
        model(torch.randn(2, 1, 16, 16), torch.rand(2), ids, mask)
    for call in calls:
        weights = call.weights()
        assert weights.shape == (2, 2, 64, 7)
        assert_close(weights.sum(-1), torch.ones(2, 2, 64))
        assert_close(weights[1, :, :, 3:], torch.zeros(2, 64, 4))


def test_strange_words_long_captions_and_other_sizes_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="does not know 'cat'"):
        model.encode(["a cat"])
    with pytest.raises(ValueError, match="want 7 at most"):
        model.encode(["a 3 left of a 7 and a"])
    with pytest.raises(ValueError, match=r"want \[batch, 1, 16, 16\]"):
        model.cut(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="2 captions and noise for 3"):
        model.sample(CAPTIONS, noise=torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match="no multiple"):
        DiffusionConfig(image_size=15)
