"""Sizes of a run: chosen by the speed of passes, kept for the next run in the folder; the time left by work done."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyheads.explain.sizes import CURVES, SAMPLES, choose
from manyheads.heads import command as heads
from manyheads.hosts.loading import load_model
from manyheads.runs.cells import Cell
from manyheads.runs.progress import Estimate
from manyheads.runs.sizes import FILE, Speed, first_within, keep_sizes, kept_sizes
from manyheads.runs.steps import Progress
from manyheads.shrink import command as shrink
from manyheads.shrink.plan import Plan, Sizes, choices
from manyheads.shrink.variants import Profiles, read_variants

# Seconds of a pass and of a token: the packaged model's on a core three times as slow as it was measured on, and those
# of a model of 135 million parameters.
SMALL, LARGE = Speed(0.012, 0.0002, 1730.0), Speed(0.08, 0.0035, 6146.0)


def cells() -> list[Cell]:
    places = [(n, trials, kind) for n in (128, 512, 2048) for trials in (1, 4) for kind in ("dense", "snapkv", "h2o")]
    return [
        Cell("answers", kind, {"task": f"t{trials}", "n": n}, {"n": n, "t": trials, "k": kind}, "")
        for n, trials, kind in places
    ]


def weight(cell: Cell) -> float:
    return float(cell.place["n"]) * int(cell.place["task"][1:])


def test_time_left_after_a_tenth_of_the_work() -> None:
    """Short cells come first; by their number a tenth of the work is half of the run."""
    every = sorted(cells(), key=weight)
    whole, done, estimate = sum(map(weight, every)), 0.0, Estimate(weight)
    left = list(every)
    while done < 0.1 * whole:
        cell = left.pop(0)
        estimate.learn(cell, 0.01 * weight(cell))
        done += weight(cell)
    seconds, unknown = estimate.left(left)
    assert unknown == 0
    assert seconds == pytest.approx(0.01 * (whole - done), rel=0.25)


def test_a_policy_that_is_slow_for_its_weight_is_known_by_its_own_cells() -> None:
    a8, a16, b8, b16 = (Cell("answers", m, {"n": n, "task": "t1"}, {"m": m, "n": n}, "") for m in "ab" for n in (8, 16))
    estimate = Estimate(weight)
    estimate.learn(a8, 8.0)
    estimate.learn(b8, 80.0)
    assert estimate.left([a16]) == (16.0, 0)
    assert estimate.left([b16]) == (160.0, 0)


def test_time_left_of_a_measure_is_by_work() -> None:
    """Ten steps of one unit, then ten of nine: after the tenth a tenth is done."""
    now, out = [0.0], io.StringIO()
    progress = Progress(Console(file=out, width=200), clock=lambda: now[0])
    with progress.measure("gates", [1.0] * 10 + [9.0] * 10) as tell:
        for done in range(1, 11):
            now[0] += 20.0
            tell(done, 20, "")
    assert "10/20: about 30 min left" in out.getvalue()


def test_a_small_model_gets_everything() -> None:
    loaded = load_model()
    options = choices(Sizes(), lengths=True, trials=True)
    variants = read_variants(["streaming", "duo"], [("compression_ratio", 0.5)], Profiles(loaded, None))
    plans = [Plan(variants, sizes=own) for own in options]
    assert first_within(plans, lambda own: own.total(SMALL), 3 * shrink.ROOM).sizes == Sizes()
    assert first_within(heads.CHOICES, lambda own: heads.seconds(SMALL, list(heads.MEASURES), *own), heads.ROOM) == (
        heads.LENGTH, heads.STEPS,
    )  # fmt: skip
    found = choose(0.01, 100, 7, thorough=False, faithful=True, detectors=True, causal=True)
    assert (found.samples, (found.steps, found.ranked), found.note) == (SAMPLES[0], CURVES[0], "")


def test_a_large_model_gets_what_fits_and_is_told_so() -> None:
    variants = read_variants(["streaming", "snapkv"], [("compression_ratio", 0.5)], Profiles(load_model(), None))
    plans = [Plan(variants, sizes=own) for own in choices(Sizes(), lengths=True, trials=True)]
    totals = [own.total(LARGE) for own in plans]
    assert totals == sorted(totals, reverse=True)
    chosen = first_within(plans, lambda own: own.total(LARGE), 240)
    assert 120 < chosen.total(LARGE) <= 240 < totals[0]
    length, steps = first_within(
        heads.CHOICES, lambda own: heads.seconds(LARGE, list(heads.MEASURES), *own), heads.ROOM
    )
    assert 100 < heads.seconds(LARGE, list(heads.MEASURES), length, steps) <= 240
    found = choose(0.15, 34, 7, thorough=False, faithful=True, detectors=True, causal=True)
    assert found.samples != SAMPLES[0]
    assert "--thorough runs all" in found.note
    whole = choose(0.15, 34, 7, thorough=True, faithful=True, detectors=True, causal=True)
    assert (whole.samples, (whole.steps, whole.ranked), whole.note) == (SAMPLES[0], CURVES[0], "")


@pytest.mark.parametrize("n", [60, 100, 180, 256])
def test_faithfulness_of_a_real_model_is_measured_on_what_fits_and_said(n: int) -> None:
    """A pass of a model of 135M parameters takes 2.8 ms for each of its tokens, and twenty more."""
    found = choose(0.0028 * (n + 20), n, 7, thorough=False, faithful=True, detectors=True, causal=True)
    assert found.steps >= 2
    assert "not measured" not in found.note
    assert f"of {n} tokens drawn by chance" in found.note
    assert found.seconds[1] <= 12 + 14 * 0.0028 * (n + 20)


def test_what_was_asked_for_stays() -> None:
    assert {own.lengths for own in choices(Sizes((300, 700)), lengths=False, trials=True)} == {(300, 700)}
    assert {own.trials for own in choices(Sizes(trials=3), lengths=True, trials=False)} == {3}


def test_sizes_are_kept_by_what_they_were_chosen_for(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert kept_sizes(folder, {"model": "a"}) is None
    keep_sizes(folder, {"model": "a"}, {"length": 1})
    keep_sizes(folder, {"model": "b"}, {"length": 2})
    keep_sizes(folder, {"model": "a"}, {"length": 3})
    assert [kept_sizes(folder, {"model": name}) for name in "abc"] == [{"length": 3}, {"length": 2}, None]
    (folder / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read .* delete it"):
        kept_sizes(folder, {"model": "a"})


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> list[Speed]:
    """Each run finds the machine as slow as the first of the list says."""
    given: list[Speed] = []

    def of(model: Any, clock: Any = None) -> Speed:
        return given[0]

    monkeypatch.setattr(Speed, "of", of)
    return given


def test_a_run_goes_on_with_its_sizes_on_a_faster_machine(tmp_path: Path, speeds: list[Speed]) -> None:
    loaded, out = load_model(), tmp_path / "out"
    variants = read_variants(["streaming", "snapkv"], [("compression_ratio", 0.5)], Profiles(loaded, None))
    asked = Plan(variants, sizes=Sizes())
    speeds[:] = [LARGE]
    first = shrink.within_time(loaded, asked, out, lengths=True, trials=True)
    assert first.sizes != Sizes()
    speeds[:] = [SMALL]
    again = shrink.within_time(loaded, asked, out, lengths=True, trials=True)
    assert (again.sizes, again.note) == (first.sizes, first.note)
    assert again.describe()["sizes"] == first.note
    other = shrink.within_time(loaded, asked, tmp_path / "other", lengths=True, trials=True)
    assert other.sizes == Sizes()


def test_heads_go_on_with_their_sizes(tmp_path: Path, speeds: list[Speed]) -> None:
    speeds[:] = [LARGE]
    quiet = Progress(Console(quiet=True))
    first = heads.Study(None, tmp_path, progress=quiet)
    first._choose(list(heads.MEASURES))
    assert (first.length, first.steps) != (heads.LENGTH, heads.STEPS)
    speeds[:] = [SMALL]
    again = heads.Study(None, tmp_path, progress=quiet)
    again._choose(list(heads.MEASURES))
    assert (again.length, again.steps, again.note) == (first.length, first.steps, first.note)
    asked = heads.Study(None, tmp_path, length=320, progress=quiet)
    asked._choose(list(heads.MEASURES))
    assert asked.length == 320
    whole = heads.Study(None, tmp_path, progress=quiet, thorough=True)
    whole._choose(list(heads.MEASURES))
    assert (whole.length, whole.steps) == (heads.LENGTH, heads.STEPS)
