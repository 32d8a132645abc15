"""Forms of personalisation: what learns and what stays, plain fine-tuning at the neutral setting, each form's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawing_models import tiny, tiny_unet
from torch.testing import assert_close

from manyheads.steer.diffusion.word_maps import scaled_map
from manyheads.steer.personal.attencraft import jensen_shannon
from manyheads.steer.personal.disendiff import disendiff_loss
from manyheads.steer.personal.dreamtext import character_loss, character_masks
from manyheads.steer.personal.form import form, forms
from manyheads.steer.personal.mcpl import contrastive_loss, on_pixels, union_mask
from manyheads.steer.personal.passes import draw_noise, noisy
from manyheads.steer.personal.subjects import Album, read_subjects
from manyheads.steer.personal.training import Plan, _begins_quietly, personalise, with_words

SUBJECTS = ("mine=3", "yours=7")
CAPTION = {"disendiff": "mine 3 and yours 7"}
NAMES = ("attencraft", "disendiff", "dreamtext", "mcpl")
SHORT = Plan(steps=3, batch=2, rate=0.05)


def begun(name: str, make: Any = tiny, typed: tuple[str, ...] = SUBJECTS) -> tuple[Any, Album]:
    model = make()
    subjects = read_subjects(model, typed)
    pictures = torch.rand(2, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(3)) * 2 - 1
    caption = CAPTION.get(name, "a mine and a yours")
    return with_words(model, subjects), Album(pictures, (caption, caption), subjects)


def arguments(name: str) -> dict[str, Any]:
    """Of a model that draws noise, whose maps claim little."""
    return {"attencraft": {"threshold": -1.0}, "dreamtext": {"deviations": 1.0}}.get(name, {})


def seen(base: Any, album: Album) -> Any:
    noise, times = draw_noise(base, 2, 0)
    return noisy(base, album.pictures, noise, times, list(album.captions), [0, 1])


def test_the_forms_are_these() -> None:
    assert tuple(own.name for own in forms()) == NAMES
    with pytest.raises(ValueError, match="did you mean 'disendiff'"):
        form("disendif")


@pytest.mark.parametrize("make", [tiny, tiny_unet])
def test_a_new_word_draws_as_the_word_that_it_begins_as(make: Any) -> None:
    base, _ = begun("mcpl", make)
    plain = make()
    told = ["a mine left of a yours", "a 3 left of a 7", "a 2"]
    assert_close(base.sample(told, steps=2), plain.sample(["a 3 left of a 7", "a 3 left of a 7", "a 2"], steps=2))
    assert "mine" not in plain.config.words


@pytest.mark.parametrize("make", [tiny, tiny_unet])
@pytest.mark.parametrize("name", NAMES)
def test_only_the_words_and_the_named_projections_learn(name: str, make: Any) -> None:
    base, album = begun(name, make)
    made, before = personalise(base, album, form(name), arguments(name), SHORT), base.state_dict()
    mine = [base.config.words.index(word) for word in album.words]
    for key, value in made.state_dict().items():
        moved = not torch.equal(value, before[key])
        if key == "words.weight":
            rows = (value != before[key]).any(1).nonzero().flatten().tolist()
            assert rows == mine
        else:
            assert moved == ("cross_attention" in key and key.split(".")[-2] in form(name).trains), key


@pytest.mark.parametrize("name", NAMES)
def test_neutral_is_plain_fine_tuning_and_the_default_is_not(name: str) -> None:
    """The form's own parameters by the velocity's error alone, as written out here."""
    base, album = begun(name)
    own = form(name)
    plan = Plan(steps=2, batch=2, rate=0.05, seed=1)
    plain = personalise(base, album, own, own.plain(arguments(name)), plan)

    learner, _ = begun(name)
    trained = {"words.weight": learner.words.weight} | {
        key: value for key, value in learner.named_parameters()
        if "cross_attention" in key and key.split(".")[-2] in own.trains
    }  # fmt: skip
    for value in trained.values():
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, weight_decay=0.0)
    told = [album.before(album.captions[i % 2]) for i in range(32)]
    kept = base.sample(told, steps=10, seed=2).clamp(-1, 1) if own.prior else None
    for step in range(2):
        generator = torch.Generator().manual_seed(1_000_003 + step)
        rows = torch.randint(2, (2,), generator=generator).tolist()
        pictures, captions = [album.pictures[rows]], [album.captions[row] for row in rows]
        if kept is not None:
            others = torch.randint(32, (2,), generator=generator).tolist()
            pictures.append(kept[others])
            captions += [told[i] for i in others]
        x = torch.cat(pictures)
        noise, times = draw_noise(learner, len(x), 1_000_003 + step)
        t = times[:, None, None, None]
        with _begins_quietly(learner):
            v = learner((1 - t) * x + t * noise, times, *learner.encode(captions)).velocity
        error = (v - (noise - x)) ** 2
        loss = error[:2].mean() + (error[2:].mean() if kept is not None else 0)
        optimizer.zero_grad()
        loss.backward()
        learner.words.weight.grad[: len(tiny().config.words)] = 0
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    for key, value in trained.items():
        assert_close(plain.state_dict()[key], value.detach())
    given = personalise(base, album, own, arguments(name), plan)
    assert any(not torch.equal(value, plain.state_dict()[key]) for key, value in given.state_dict().items())


@pytest.mark.parametrize("make", [tiny, tiny_unet])
def test_the_word_that_begins_captions_gives_no_gradient(make: Any) -> None:
    base, album = begun("disendiff", make)
    base.words.weight.requires_grad_(True)
    with _begins_quietly(base):
        seen(base, album).error.mean().backward()
    rows = base.words.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == sorted({base.config.words.index(word) for word in album.captions[0].split()})
    base.words.weight.grad = None
    seen(base, album).error.mean().backward()
    assert float(base.words.weight.grad[0].abs().sum()) > 0


def test_disendiff_binds_the_word_to_the_one_behind_it() -> None:
    base, album = begun("disendiff")
    own = seen(base, album)
    lesson = form("disendiff").open(base, album, weight=0.5)
    maps = [disendiff_loss([m[:, 1], m[:, 4]], [m[:, 2], m[:, 5]]) for m in own.maps]
    assert_close(lesson(0, own), own.error.mean() + 0.5 * (maps[0] + maps[1]) / 2)


def test_mcpl_masks_the_error_and_contrasts_the_words() -> None:
    base, album = begun("mcpl")
    own = seen(base, album)
    lesson = form("mcpl").open(base, album, scale=2.0, threshold=0.9)
    inside = on_pixels(union_mask(own.maps[:, :, [2, 5]].transpose(1, 2), 0.9), 8)
    assert 0 < float(inside.double().mean()) < 1
    ids, _ = base.encode(album.captions)
    views = (base.words(ids) + base.word_places[: ids.shape[1]])[:, [2, 5]]
    assert_close(lesson(0, own), (own.error * inside[:, None]).mean() + 2 * contrastive_loss(views))


def test_mcpl_binds_adjectives_as_further_views() -> None:
    base, album = begun("mcpl")
    album = Album(album.pictures, ("left mine and right yours",) * 2, album.subjects)
    own = seen(base, album)
    lesson = form("mcpl").open(base, album, scale=1.0, masked=False, adjectives="left,right")
    ids, _ = base.encode(album.captions)
    words = base.words(ids) + base.word_places[: ids.shape[1]]
    assert_close(lesson(0, own), own.error.mean() + contrastive_loss(torch.cat([words[:, [2, 5]], words[:, [1, 4]]])))


def test_dreamtext_weighs_the_maps_and_the_error_inside_of_each_characters_mask() -> None:
    base, album = begun("dreamtext")
    own = seen(base, album)
    lesson = form("dreamtext").open(base, album, weight=0.3, masked=0.7, deviations=1.0)
    wanted = own.error.mean()
    for row in range(2):
        maps = own.maps[row][:, [2, 5]].T
        wanted = wanted + 0.3 * character_loss(maps, deviations=1.0) / 2
        for mask in on_pixels(character_masks(maps, deviations=1.0)[1], 8):
            assert bool(mask.any())
            wanted = wanted + 0.7 * (own.error[row] * mask).mean() / 4
    assert_close(lesson(0, own), wanted)


def test_attencraft_tells_concepts_in_turn_and_trains_inside_of_their_masks() -> None:
    base, album = begun("attencraft")
    lesson: Any = form("attencraft").open(base, album, weight=0.3, threshold=-1.0)
    assert lesson.captions(20, [0, 1]) == list(album.captions)
    told = [caption for step in range(1, 20) for caption in lesson.captions(step, [0, 1])]
    shares = [told.count(own) / len(told) for own in ("a mine", "a yours", album.captions[0])]
    assert sum(shares) == 1
    assert min(shares) > 0.15
    masks = torch.zeros(3, 16, dtype=torch.bool)
    masks[0, :4], masks[1, 4:8], masks[2, 8:] = True, True, True
    lesson.masks = {0: masks, 1: masks}
    noise, times = draw_noise(base, 2, 0)
    own = noisy(base, album.pictures, noise, times, ["a mine", album.captions[1]], [0, 1])
    inside = on_pixels(torch.stack([masks[0], masks[:2].any(0)]), 8)
    js = 0.0
    for row, places, which in ((0, [2, 0], [0, 2]), (1, [2, 5, 0], [0, 1, 2])):
        pairs = zip(own.maps[row].T[places], masks[which].double(), strict=True)
        js = js + sum(jensen_shannon(scaled_map(a), b) for a, b in pairs) / len(places) / 2
    assert_close(lesson(1, own), (own.error * inside[:, None]).mean() + 0.3 * js)


def test_attencraft_takes_new_masks_only_where_they_are_like_the_old_and_none_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, album = begun("attencraft")
    lesson: Any = form("attencraft").open(base, album, threshold=-1.0)
    old = torch.zeros(3, 16, dtype=torch.bool)
    old[0, :8], old[1, 8:12], old[2, 12:] = True, True, True
    like, unlike, empty = old.clone(), old.roll(5, 1), old.clone()
    like[2, 11] = True
    empty[2] = False
    for found, wanted in ((like, like), (unlike, old), (empty, old)):
        lesson.masks = {0: old, 1: old}
        monkeypatch.setattr(lesson, "_found", lambda own, rows, found=found: found)
        lesson(20, seen(base, album))
        assert all(torch.equal(lesson.masks[row], wanted) for row in (0, 1))
    lesson.masks = {0: old, 1: old}
    monkeypatch.setattr(lesson, "_found", lambda own, rows: like)
    lesson(21, seen(base, album))
    assert torch.equal(lesson.masks[0], old)
