"""Interventions on a model that draws: neutral settings change nothing, and each rule against loops."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from drawing_models import CAPTIONS, before_and_after, features_of, read_words, tiny, tiny_unet
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.hosts.taps import record
from manyheads.models.flow import Step
from manyheads.steer.diffusion import (
    borrow_maps,
    box_mask,
    colour_propagation,
    count_peaks,
    edit_words,
    hunt_heads,
    isolate,
    layers_in,
    layout_guidance,
    masks_by_kind,
    merge_concepts,
    multi_reference,
    multi_view,
    perturbed_guidance,
    plug_and_play,
    regional_prompts,
    reposition,
    self_heads,
    space_time,
    until,
)
from manyheads.steer.diffusion.colour_propagation import neighbour
from manyheads.steer.diffusion.concept_conductor import merged
from manyheads.steer.diffusion.space_time import disc
from manyheads.steer.perturb import perturb
from manyheads.steer.prompting import kind_of

MODEL = tiny()
MODELS = {"dit": MODEL, "unet": tiny_unet()}
LEFT, RIGHT = box_mask(MODEL, (2, 0, 6, 4)), box_mask(MODEL, (2, 4, 6, 8))
BOTH, ALL, NONE = torch.stack([LEFT, RIGHT]), torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
WAY = MODEL.noised(torch.zeros(1, 1, 8, 8), steps=3)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def never(step: int, layer: int) -> bool:
    return False


Opened = Callable[[Any], AbstractContextManager[Any]]
NEUTRAL: dict[str, Opened] = {
    "perturbed: scale 0": lambda m: perturbed_guidance(m, None, scale=0),
    "perturbed: amount 0": lambda m: perturbed_guidance(m, [(1, 0)], amount=0),
    "plug_and_play": lambda m: plug_and_play(m, 2, active=until(0, 3), features=features_of(m), features_active=never),
    "isolate": lambda m: isolate(m, LEFT[None]),
    "regional: weight 0": lambda m: regional_prompts(m, ["a 3", "a 7"], BOTH, weight=0),
    "space_time": lambda m: space_time(m, ["a 3"], [(0.5, 0.5)], 0),
    "edit_words": lambda m: edit_words(m, [2]),
    "borrow_maps": lambda m: borrow_maps(m, 0, words=[2], active=never),
    "multi_reference: none": lambda m: multi_reference(m, 0, {}),
    "multi_reference: empty masks": lambda m: multi_reference(m, 0, {1: NONE}),
    "multi_view": lambda m: multi_view(m, [0, 1], scale=0),
    "layout": lambda m: layout_guidance(m, WAY, strength=0),
    "merge": lambda m: merge_concepts(m, 0, {1: NONE}),
    "colour": lambda m: colour_propagation(m, [1]),
}
CHANGED: dict[str, Opened] = {
    "perturbed": lambda m: perturbed_guidance(m, [(1, 0)]),
    "plug_and_play": lambda m: plug_and_play(m, 2, active=until(0.5, 3)),
    "features": lambda m: plug_and_play(m, 2, active=never, features=features_of(m)),
    "isolate": lambda m: isolate(m, BOTH),
    "regional": lambda m: regional_prompts(m, ["a 3", "a 7"], BOTH),
    "space_time": lambda m: space_time(m, ["a 3"], [(0.5, 0.5)], 0.5),
    "edit_words": lambda m: edit_words(m, [2], times=0),
    "borrow_maps": lambda m: borrow_maps(m, 0, words=[2]),
    "multi_reference": lambda m: multi_reference(m, 0, {1: LEFT}),
    "multi_view": lambda m: multi_view(m, [0, 1]),
    "layout": lambda m: layout_guidance(m, WAY),
    "merge": lambda m: merge_concepts(m, 0, {1: LEFT}),
    "colour": lambda m: colour_propagation(m, [0, 1]),
}


def broken(pictures: Tensor, step: Any) -> Tensor:
    if step.index == 1:
        raise KeyError
    return pictures


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit(model: Any, name: str) -> None:
    plain = model.sample(CAPTIONS, steps=3)
    with NEUTRAL[name](model):
        assert torch.equal(model.sample(CAPTIONS, steps=3), plain)


@pytest.mark.parametrize("name", CHANGED)
def test_another_setting_changes_pictures_and_nothing_stays_behind(model: Any, name: str) -> None:
    plain = model.sample(CAPTIONS, steps=3)
    with CHANGED[name](model):
        assert (model.sample(CAPTIONS, steps=3) - plain).abs().max() > 1e-5
    with pytest.raises(KeyError), CHANGED[name](model):
        model.sample(CAPTIONS, steps=3, watch=broken)
    assert model.step is None
    assert not model.moves()
    assert not model.corrections()
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())
    assert torch.equal(model.sample(CAPTIONS, steps=3), plain)


def loops(q: Tensor, k: Tensor, v: Tensor, scale: float, bonus: Callable[[int, int], float] = lambda i, j: 0) -> Tensor:
    """q [h, n, d], k [h, m, d], v [h, m, e]."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            scores = [
                scale * sum(float(a * b) for a, b in zip(q[head, i], k[head, j], strict=True)) + bonus(i, j)
                for j in range(k.shape[1])
            ]
            shares = [math.exp(score) for score in scores]
            for j, share in enumerate(shares):
                out[head, i] += share / sum(shares) * v[head, j]
    return out


def cell(i: int) -> int:
    """Of BOTH, which subject patch i of the 4 x 4 grid is of; -1 for none."""
    row, column = divmod(i, 4)
    return -1 if row in (0, 3) else column // 2


def test_isolation_hides_the_other_subject_and_nothing_else(model: Any) -> None:
    before, after = before_and_after(model, isolate(model, BOTH), "self")

    def rule(i: int, j: int) -> float:
        return 0.0 if -1 in (cell(i), cell(j)) or cell(i) == cell(j) else -math.inf

    for row in (0, 4):
        q, k, v = before.query[row], before.key[row], before.value[row]
        assert_close(after.output[row], loops(q, k, v, before.scale, rule))


def test_isolation_shows_a_reference_to_its_subject_alone(model: Any) -> None:
    change = isolate(model, BOTH, references={1: 2}, reference_masks=BOTH)
    before, after = before_and_after(model, change, "self")

    def rule(i: int, j: int) -> float:
        if j >= 16:
            return 0.0 if cell(j - 16) == 1 and cell(i) in (-1, 1) else -math.inf
        return 0.0 if -1 in (cell(i), cell(j)) or cell(i) == cell(j) else -math.inf

    k, v = (torch.cat([tensor[3], tensor[5]], 1) for tensor in (before.key, before.value))
    assert_close(after.output[3], loops(before.query[3], k, v, before.scale, rule))
    assert torch.equal(after.output[5], before.output[5])  # the reference itself


def test_reposition_is_the_identity_on_equal_boxes_and_moves_whole_patches() -> None:
    grid = torch.randn(1, 4, 4, 3)
    assert torch.equal(reposition(grid, (1, 0, 3, 2), (1, 0, 3, 2)), grid)
    moved = reposition(grid, (0, 0, 2, 2), (1, 2, 3, 4))
    assert torch.equal(moved[:, 1:3, 2:4], grid[:, 0:2, 0:2])
    assert torch.equal(moved[:, 0], grid[:, 0])
    with pytest.raises(ValueError, match="leaves a grid"):
        reposition(grid, (0, 0, 2, 5), (0, 0, 2, 2))


def test_regions_read_their_own_words(model: Any) -> None:
    before, after = before_and_after(model, regional_prompts(model, ["a 3", "a 7"], BOTH), "cross")
    read = [loops(before.query[3], *read_words(model, caption), before.scale) for caption in ("a 3", "a 7")]
    for i in range(16):
        wanted = before.output[3, :, i] if cell(i) < 0 else read[cell(i)][:, i]
        assert_close(after.output[3, :, i], wanted)
    assert torch.equal(after.output[:3], before.output[:3])


def test_one_region_of_everything_with_the_own_caption_is_plain(model: Any) -> None:
    plain = model.sample(CAPTIONS[:1], steps=3)
    with regional_prompts(model, CAPTIONS[:1], ALL):
        assert_close(model.sample(CAPTIONS[:1], steps=3), plain)


def test_space_time_adds_an_objects_caption_less_the_row_without_one(model: Any) -> None:
    c = [[0.0, 0.0], [0.3, 0.7], [0.0, 0.0], [0.0, 0.0]]
    centres = [(0.5, 0.25), (0.5, 0.5)]
    before, after = before_and_after(model, space_time(model, ["a 3", "a 7"], centres, c), "cross", index=1)
    same, plain = before_and_after(model, space_time(model, ["a 3", "a 7"], centres, c), "cross", index=0)
    assert torch.equal(same.output, plain.output)
    own = [loops(before.query[4], *read_words(model, caption), before.scale) for caption in ("a 3", "a 7")]
    for i in range(16):
        wanted = before.output[4, :, i].clone()
        for k, centre in enumerate(centres):
            if math.hypot(i // 4 / 4 - centre[0], i % 4 / 4 - centre[1]) <= 0.2:
                wanted += c[1][k] * (own[k][:, i] - before.output[1, :, i])
        assert_close(after.output[4, :, i], wanted)
    assert disc(5, (0.4, 0.4), 0.21).sum() == 5


def test_words_are_weighed_where_they_are_asked_and_rows_do_not_sum_to_one(model: Any) -> None:
    change = edit_words(model, [2, 6], add=0.1, times=0.5, patches=slice(4, 8), rows=[0])
    before, after = before_and_after(model, change, "cross")
    weights = before.weights()[3].clone()
    for i in range(4, 8):
        for j in (2, 6):
            weights[:, i, j] = 0.5 * weights[:, i, j] + 0.1
    assert_close(after.output[3], weights @ before.value[3])
    assert torch.equal(after.output[4:], before.output[4:])
    # A word that another, shorter caption does not have stays unseen.
    _, short = before_and_after(model, edit_words(model, [6], add=0.1), "cross")
    assert_close(short.output[4], before.output[4])


def test_borrowed_maps_are_the_sources_but_for_named_words(model: Any) -> None:
    before, after = before_and_after(model, borrow_maps(model, 0, words=[2]), "cross")
    weights = before.weights()[3].clone()
    weights[:, :, 2] = before.weights()[5][:, :, 2]
    assert_close(after.output[5], weights @ before.value[5])
    before, after = before_and_after(model, borrow_maps(model, 0, shift=3), "self")
    turned = before.weights()[3].roll((3, 3), (1, 2))
    assert_close(after.output[4], turned @ before.value[4])
    assert torch.equal(after.output[:4], before.output[:4])


def test_peaks_are_counted_over_the_mean_and_plateaus_once() -> None:
    assert count_peaks(torch.tensor([0, 1, 0, 2, 2, 0, 0.1, 0, 3, 0])) == 3
    assert count_peaks(torch.ones(5)) == 0


def test_references_are_read_inside_of_their_masks_with_their_bonus(model: Any) -> None:
    change = multi_reference(model, 0, {2: LEFT, 1: RIGHT}, weights={2: 3.0, 1: 0.5}, style_fidelity=0.25)
    before, after = before_and_after(model, change, "self")

    def bonus(i: int, j: int) -> float:
        if j < 16:
            return 0.0
        place, weight = ((0, 3.0), (1, 0.5))[(j - 16) // 16]
        return weight if cell(j % 16) == place else -math.inf

    for own, others in ((0, [2, 1]), (3, [5, 4])):
        k, v = (torch.cat([tensor[row] for row in (own, *others)], 1) for tensor in (before.key, before.value))
        mixed = loops(before.query[own], k, v, before.scale, bonus)
        share = 0.25 if own == 0 else 0.0
        assert_close(after.output[own], share * before.output[own] + (1 - share) * mixed)
        assert torch.equal(after.output[own + 1 : own + 3], before.output[own + 1 : own + 3])


def test_views_read_the_same_row_of_all_views(model: Any) -> None:
    change = multi_view(model, [2, 0], scale=0.7, reference=1, reference_scale=0.2)
    before, after = before_and_after(model, change, "self")
    for row in (5, 3):
        wanted = before.output[row].clone()
        wanted += 0.2 * loops(before.query[row], before.key[4], before.value[4], before.scale)
        for i in range(4):
            own = slice(4 * i, 4 * i + 4)
            k, v = (torch.cat([tensor[view, :, own] for view in (3, 5)], 1) for tensor in (before.key, before.value))
            wanted[:, own] += 0.7 * loops(before.query[row, :, own], k, v, before.scale)
        assert_close(after.output[row], wanted)
    assert torch.equal(after.output[4], before.output[4])


def test_frames_read_the_one_before_and_the_next_in_turn(model: Any) -> None:
    assert [neighbour(i, 3, 0) for i in range(3)] == [0, 0, 1]
    assert [neighbour(i, 3, 1) for i in range(3)] == [1, 2, 2]
    before, after = before_and_after(model, colour_propagation(model, [0, 1, 2]), "self", index=1)
    k, v = (torch.cat([tensor[4], tensor[3]], 1) for tensor in (before.key, before.value))
    assert_close(after.output[3], loops(before.query[3], k, v, before.scale))
    before, after = before_and_after(model, colour_propagation(model, [0, 1, 2], own=False), "self", index=0)
    assert_close(after.output[4], loops(before.query[4], before.key[3], before.value[3], before.scale))


def test_concepts_are_merged_by_mask_and_the_last_one_wins(model: Any) -> None:
    before, after = before_and_after(model, merge_concepts(model, 0, {1: LEFT, 2: ALL[0] & ~RIGHT}), "cross")
    for i in range(16):
        wanted = before.output[3 if cell(i) == 1 else 5, :, i]
        assert_close(after.output[3, :, i], wanted)
    assert torch.equal(after.output[:3], before.output[:3])
    base, others = torch.zeros(3, 1), [torch.full((3, 1), own) for own in (1.0, 2.0)]
    masks = torch.tensor([[True, True, False], [False, True, False]])
    assert merged(base, others, masks).flatten().tolist() == [1, 2, 0]


def test_layout_guidance_goes_down_its_energy_and_is_zero_at_the_layout_itself(model: Any) -> None:
    seen = {}

    def watch(pictures: Tensor, step: Any) -> Tensor:
        seen[step.index] = pictures
        return pictures

    with layout_guidance(model, WAY):
        model.sample(CAPTIONS[:1], steps=3, noise=WAY[0], watch=watch)
    assert_close(seen[0], WAY[0])
    start = torch.randn(1, 1, 8, 8, dtype=torch.double)
    energies = []
    for strength in (0.0, 1e-3):
        with layout_guidance(model, WAY, strength=strength):
            model.sample(CAPTIONS[:1], steps=3, noise=start, watch=watch)
        ids, mask = model.encode(CAPTIONS[:1])
        maps = []
        for x in (seen[0], WAY[0]):
            with torch.no_grad(), record(model, kind="self") as calls:
                model.velocities(x, 1.0, ids, mask)
            maps.append([call.weights().mean(1) for call in calls])
        energies.append(sum(float(((a - b) ** 2).sum()) for a, b in zip(*maps, strict=True)))
    assert energies[1] < energies[0]


def test_kinds_of_patches_are_found() -> None:
    features = torch.cat([torch.zeros(3, 2), torch.full((4, 2), 5.0), torch.full((2, 2), -9.0)])
    masks = masks_by_kind(features + 0.01 * torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), 3)
    assert sorted(mask.nonzero().flatten().tolist() for mask in masks) == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]


def test_guidance_goes_away_from_the_perturbed_velocity(model: Any) -> None:
    x = model.noise(1, 3)
    (ids, mask), (none, nothing) = model.encode(["a 2"]), model.encode([""])
    with torch.no_grad():
        v, v0 = model.velocities(x, 1.0, ids, mask), model.velocities(x, 1.0, none, nothing)
        with perturb(model, 0.5, heads=[(0, 1)]):
            weak = model.velocities(x, 1.0, ids, mask)
    with perturbed_guidance(model, [(0, 1)], amount=0.5, scale=2.0):
        found = model.sample(["a 2"], steps=1, noise=x, guidance=3.0)
    assert_close(found, x - (v0 + 3 * (v - v0) + 2 * (v - weak)))


def test_the_hunt_returns_the_greatest_terms_of_a_sum() -> None:
    worth = {head: float(value) for head, value in zip(self_heads(MODEL), [3, 9, 1, 7], strict=True)}
    found = hunt_heads(lambda heads: sum(worth[head] for head in heads), list(worth), rounds=2)
    assert found == [(0, 1), (1, 1)]
    assert hunt_heads(lambda heads: sum(worth[head] for head in heads), list(worth), rounds=1, take=3)[2] == (0, 0)
    with pytest.raises(ValueError, match="want as many"):
        hunt_heads(lambda heads: 0, list(worth), rounds=5)


def test_a_target_that_is_the_source_stays_the_source_under_its_maps(model: Any) -> None:
    noise = model.noise(1, 0).expand(2, -1, -1, -1)
    with plug_and_play(model, 1):
        found = model.sample(["a 2", "a 2"], steps=3, noise=noise, guidance=1.0)
    assert_close(found[0], found[1])
    before, after = before_and_after(model, plug_and_play(model, 1), "self")
    for row in (0, 1, 3):
        assert_close(after.output[row], loops(before.query[4], before.key[4], before.value[row], before.scale))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: box_mask(m, (0, 0, 9, 4)), "no region"),
        (lambda m: isolate(m, torch.ones(1, 4, 4)), r"want \[regions, 8, 8\]"),
        (lambda m: isolate(m, torch.stack([LEFT, LEFT])), "overlap"),
        (lambda m: isolate(m, BOTH, references={0: 1}), "both or none"),
        (lambda m: regional_prompts(m, ["a 3"], BOTH), "one for each"),
        (lambda m: regional_prompts(m, ["a 3", "a 7"], torch.stack([LEFT, LEFT])), "sum to 1"),
        (lambda m: space_time(m, ["a 3"], [(0.5, 0.5)], [[1.0]]), "coefficients for 1 steps"),
        (lambda m: space_time(m, ["a 3"], [(0.5, 1.5)], 1.0), "want a place"),
        (lambda m: edit_words(m, [9], times=0), "no word at"),
        (lambda m: borrow_maps(m, 7), "borrow_maps: source"),
        (lambda m: multi_reference(m, 0, {0: LEFT}), "among its references"),
        (lambda m: multi_view(m, [0, 0]), "want different ones"),
        (lambda m: merge_concepts(m, 0, {5: LEFT}), "merge_concepts: rows"),
        (lambda m: layout_guidance(m, WAY[:2]), "layout_guidance: layout is"),
        (lambda m: perturbed_guidance(m, [(9, 0)]), "no such layers"),
        (lambda m: until(1.5, 4), "share of the steps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model: Any, make: Opened, message: str) -> None:
    with pytest.raises(ValueError, match=message), make(model):
        model.sample(CAPTIONS, steps=3)


def test_a_schedule_without_a_sampler_is_refused(model: Any) -> None:
    ids, mask = model.encode(CAPTIONS)
    with (
        isolate(model, BOTH, active=until(0.5, 4)),
        pytest.raises(ValueError, match="none is told"),
    ):
        model.velocities(model.noise(3, 0), 1.0, ids, mask)


def test_interventions_go_together_where_one_of_them_runs_the_captions_alone(model: Any) -> None:
    """Guidance away from a weak copy makes a pass of the captions without the other half; isolation acts in it too."""
    x = model.noise(1, 3)
    (ids, mask), (none, nothing) = model.encode(["a 2"]), model.encode([""])
    with torch.no_grad(), isolate(model, BOTH):
        v, v0 = model.velocities(x, 1.0, ids, mask), model.velocities(x, 1.0, none, nothing)
        with perturb(model, 1.0, heads=[(0, 1)]):
            weak = model.velocities(x, 1.0, ids, mask)
    with isolate(model, BOTH), perturbed_guidance(model, [(0, 1)]):
        found = model.sample(["a 2"], steps=1, noise=x, guidance=3.0)
    assert_close(found, x - (v0 + 3 * (v - v0) + v - weak))
    with (
        space_time(model, ["a 3"], [(0.5, 0.5)], 1.0),
        perturbed_guidance(model, [(0, 1)]),
        pytest.raises(ValueError, match="rows without captions"),
    ):
        model.sample(["a 2"], steps=1)


def test_masks_are_cut_to_the_grid_of_every_layer() -> None:
    """At 8 x 8 tokens a mask is itself, at 4 x 4 its nearest pixels."""
    seen = {}
    with isolate(MODELS["unet"], BOTH), record(MODELS["unet"], kind="self") as calls, torch.no_grad():
        ids, mask = MODELS["unet"].encode(CAPTIONS[:1])
        MODELS["unet"].velocities(MODELS["unet"].noise(1, 0), 1.0, ids, mask)
    for call in calls:
        side = math.isqrt(call.query.shape[2])
        grid = torch.full((side, side), -1)
        grid[side // 4 : 3 * side // 4, : side // 2], grid[side // 4 : 3 * side // 4, side // 2 :] = 0, 1
        of = grid.flatten()
        allowed = (of[:, None] == -1) | (of == -1) | (of[:, None] == of)
        scores = (call.query @ call.key.mT * call.scale).masked_fill(~allowed, -math.inf)
        assert_close(call.output, scores.softmax(-1) @ call.value)
        seen[side] = True
    assert sorted(seen) == [4, 8]


def test_a_part_of_a_unet_is_chosen_by_name_and_everything_else_is_left_alone() -> None:
    model = MODELS["unet"]
    assert layers_in(model, "up") == [3, 4]
    assert layers_in(model, "middle", kind="cross") == [2]
    with pytest.raises(ValueError, match="down, middle, up"):
        layers_in(model, "sideways")
    with pytest.raises(ValueError, match="no part"):
        layers_in(MODEL, "up")
    ids, mask = model.encode(CAPTIONS)
    with (
        record(model, kind="self") as before,
        plug_and_play(model, 0, active=until(1.0, 4, layers_in(model, "up"))),
        record(model, kind="self") as after,
        torch.no_grad(),
        model.told(Step(0, 4, 1.0, 0.75, ids, mask, False)),
    ):
        model.velocities(model.noise(3, 0), 1.0, ids, mask)
    assert [bool(torch.equal(a.output, b.output)) for a, b in zip(before, after, strict=True)] == [True] * 3 + [
        False
    ] * 2


def test_a_model_that_draws_is_of_a_kind_of_its_own() -> None:
    assert kind_of(MODEL) == "diffusion"
    with pytest.raises(ValueError, match="or one that draws"):
        kind_of(_Encoder())


class _Encoder:
    """Of no kind that interventions take."""

    config = type("Config", (), {"is_encoder_decoder": True})()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values


class Kernels(TorchDispatchMode):
    """Counts attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "scaled_dot_product" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["isolate", "plug_and_play"])
def test_what_is_replaced_whole_is_not_attended_twice(name: str) -> None:
    """And nothing is lost by it: a reader that only looks still finds the layer's own output."""
    change = isolate(MODEL, BOTH) if name == "isolate" else plug_and_play(MODEL, 0)
    counts = []
    for opened in (nullcontext(), change):
        with opened, Kernels() as kernels:
            MODEL.sample(CAPTIONS, steps=1)
        counts.append(kernels.count)
    assert counts[0] == counts[1] > 0
    wanted = MODEL.sample(CAPTIONS, steps=1)
    with record(MODEL, kind="self") as calls:
        assert_close(MODEL.sample(CAPTIONS, steps=1), wanted, atol=0, rtol=0)
    assert_close(calls[0].output, calls[0].weights() @ calls[0].value, atol=1e-5, rtol=1e-5)
