"""What every conversion of a checkpoint costs, right after it, taught and healed, beside the original healed alike.

    python benchmarks/convert.py                      # the packaged model, three seeds, nothing healed
    python benchmarks/convert.py --heal 100000        # and, of the first seed, healed with so many tokens
    python benchmarks/convert.py --model smollm2 --heal 8000    # one seed of a real model, what papers claim alone
    python benchmarks/convert.py --only rotary        # those whose title has the word, beside what is held
    python benchmarks/convert.py --minutes 10         # begins no further row after that; the same command goes on
    python benchmarks/convert.py --tiny --dry --transfer 2      # that it runs

A seed has text, hidden keys, calibration and training of its own, and what is random is drawn anew; all text that is
measured is held out from what calibrates and trains. Rows are saved as they come, seed by seed, and those that the same
commit holds are not measured again. A row with a claim says whether every seed has the order of damage that the papers
report: by KL to the original, where healed by bits per token. Larger models take fewer and shorter windows (`LARGE`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, save
from manyheads.convert.cases import case_spec
from manyheads.convert.damage import Judge, Sizes, answers, cache_bytes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.layout import cache_numbers
from manyheads.convert.method import Method
from manyheads.convert.methods import Grouped, Hosted, Latent, Pruned
from manyheads.convert.report import TAUGHT
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions, library_text
from manyheads.runs.environment import environment
from manyheads.runs.steps import silent

MEASURES = (
    "src/manyheads/convert",
    "src/manyheads/hosts",
)

HEDGEHOG = {"name": "hedgehog"}
HEALED = "healed"
# Of the model's parameters: above it takes what a core can do in minutes.
MANY = 10_000_000


@dataclass(frozen=True)
class Setting:
    """What one seed takes. calibrated: tokens. steps: of attention transfer, a window of text each. batch: rows of a
    step of healing. rate: of healing."""

    sizes: Sizes
    calibrated: int
    steps: int
    batch: int
    rate: float
    seeds: int


SMALL = Setting(Sizes(), 8192, 100, 4, 1e-3, 3)
LARGE = Setting(Sizes(4, 256, 4, 256), 2048, 24, 2, 1e-4, 1)
TINY = Setting(Sizes(2, 192, 2, 192), 768, 2, 2, 1e-3, 2)


@dataclass(frozen=True)
class Asked:
    """method and how far. healed: whether it is healed too, and `untaught` without its lesson besides. large: whether
    models above `MANY` parameters take it. once: of the first seed alone."""

    method: Method
    value: int
    healed: bool = False
    untaught: bool = False
    large: bool = False
    once: bool = False

    @property
    def title(self) -> str:
        own = self.method.title(self.value)
        if not isinstance(self.method, Hosted):
            return own
        given = ", ".join(
            f"{key} {value}" for key, value in self.method.spec.items() if key in ("window", "active_heads")
        )
        return f"{own}, {given}" if given else own


def conversions(loaded: Loaded, steps: int) -> list[Asked]:
    groups, heads = loaded.config.num_key_value_heads, loaded.config.num_attention_heads
    layers, half = loaded.config.num_hidden_layers, cache_numbers(loaded.model) // 2
    fewer = [g for g in range(1, groups) if groups % g == 0][::-1]
    found = [
        Asked(Grouped(align), count, healed=count == fewer[0], large=count == fewer[0])
        for count in fewer
        for align in ("procrustes", "mean", "first", "random")
    ]
    exact, fitted = Latent("exact"), Latent("fitted")
    same = beside(loaded, fewer[0]) if fewer else half
    found.append(Asked(exact, exact.within(loaded.model, same), healed=True, large=True))
    found.append(Asked(fitted, fitted.within(loaded.model, same), healed=True))
    found.append(Asked(exact, exact.within(loaded.model, same) // 3))
    every = tuple(range(layers))
    for window in (64, None):
        spec = case_spec(HEDGEHOG, heads, window=window)
        some = window is not None
        found.append(Asked(Hosted(spec, every, steps, "heads"), layers, healed=some, untaught=some, large=some))
    moh = case_spec({"name": "moh"}, heads, active=round(0.75 * heads) / heads)
    found.append(Asked(Hosted(moh, every), layers, healed=True))
    some = layers * heads * 3 // 4
    found += [Asked(Pruned(by), some, by == "importance") for by in ("importance", "random")]
    # One loss for every head and row: most of what a seed would take, and hours with hundreds of heads.
    found += [Asked(Pruned(by), some, once=True) for by in ("ablation", "alone")]
    found += [Asked(Pruned(by, uniform=False), some) for by in ("importance", "normalised")]
    size = int(loaded.config.head_dim)
    for rope, fold in ((size, 2), (size // 2, 1), (size // 2, 2), (size // 2, 4)):
        turned = Latent(rope_dim=rope, fold=fold)
        found.append(Asked(turned, turned.within(loaded.model, half)))
    return [one for one in found if one.large or loaded.model.num_parameters() < MANY]


def beside(loaded: Loaded, kv_heads: int) -> int:
    """Numbers of cache for a token where so many key/value heads are left."""
    return cache_numbers(loaded.model) * kv_heads // int(loaded.config.num_key_value_heads)


def claims(loaded: Loaded) -> list[tuple[str, list[str]]]:
    """What the papers report, and the conversions of which each is to cost less than the next."""
    groups = loaded.config.num_key_value_heads
    fewer = [g for g in range(1, groups) if groups % g == 0][::-1]
    layers, heads = loaded.config.num_hidden_layers, loaded.config.num_attention_heads
    exact, found = Latent("exact"), []
    for count in fewer:
        titles = [Asked(Grouped(align), count).title for align in ("procrustes", "mean", "first", "random")]
        found.append((f"aligned < mean < first < random heads, {count} left", titles))
    if fewer:
        latent = Asked(exact, exact.within(loaded.model, beside(loaded, fewer[0]))).title
        found += [
            (f"a latent < fewer heads ({align}), at equal bytes", [latent, Asked(Grouped(align), fewer[0]).title])
            for align in ("procrustes", "mean")
        ]
    for window in (64, None):
        hedgehog = Asked(Hosted(case_spec(HEDGEHOG, heads, window=window), tuple(range(layers))), layers).title
        found.append((f"with transfer < without, window {window or 'none'}", [f"{hedgehog}, {TAUGHT}", hedgehog]))
    important, random = (Asked(Pruned(by), layers * heads * 3 // 4).title for by in ("importance", "random"))
    return [*found, ("heads by importance < by chance", [important, random])]


def judged(loaded: Loaded, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each claim whose conversions are all there, right after and healed: what each seed has, and whether
    every seed has the order."""
    rows = []
    for claim, titles in claims(loaded):
        for stage, measure in ((None, "kl_bits"), (HEALED, "bits_per_token")):
            names = titles if stage is None else [f"{title}, {stage}" for title in titles]
            known = [
                {line["seed"]: line[measure] for line in lines if line["conversion"] == name} for name in names
            ]  # fmt: skip
            seeds = sorted(set.intersection(*map(set, known)))
            if not seeds:
                continue
            found = [[each[seed] for each in known] for seed in seeds]
            shows = all(a < b for seed in found for a, b in itertools.pairwise(seed))
            rows.append(
                {"claim": claim if stage is None else f"{claim}, {stage}", "conversions": names, "by": measure,
                 "of_seeds": found, "shows": shows}
            )  # fmt: skip
    return rows


class Seed:
    """Text, hidden keys, calibration and training of one seed."""

    def __init__(self, loaded: Loaded, number: int, setting: Setting) -> None:
        sizes, all_seeds = setting.sizes, setting.seeds
        self.number = number
        questions = Questions(loaded, seed=number)
        self.judge = Judge(loaded, questions, sizes)
        windows = questions.windows(sizes.length, sizes.windows * all_seeds)
        self.judge.windows = [torch.tensor(row) for row in windows[number::all_seeds]]
        self.learnt = Questions(loaded, text=library_text(), where="the library", seed=100 + number)
        self.rows = calibration_rows(self.learnt, setting.calibrated * all_seeds, sizes.length)[number::all_seeds]

    def figures(self, model: Any) -> dict[str, Any]:
        judge = self.judge
        text, row = judge.distance(model), judge.windows[0]
        told = sum(answers(model, trial) for trial in judge.trials)
        size = next(model.parameters()).element_size()
        return {
            "cache": cache_bytes(model, row) // (len(row) * size),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bits_per_token": text["bits_per_token"],
            "kl_bits": text["kl_bits"],
            "passkeys": told / len(judge.trials),
            "keys": len(judge.trials),
        }


class Bench:
    """Rows of one model, each saved as it comes; those that the same commit holds already are not measured again."""

    def __init__(self, loaded: Loaded, given: argparse.Namespace, setting: Setting) -> None:
        self.loaded, self.given, self.setting = loaded, given, setting
        self.name = Path(given.model).name if given.model else "byte_llama"
        self.lines: list[dict[str, Any]] = [] if given.dry else known_lines(self.name, given, setting)
        self.until = time.monotonic() + 60 * given.minutes if given.minutes else None

    def run(self, todo: list[Asked]) -> bool:
        """Whether all is measured: False where the minutes were over before."""
        try:
            for number in range(self.setting.seeds):
                self.seed = Lazy(lambda number=number: Seed(self.loaded, number, self.setting))
                self.number, self.heals = number, bool(self.given.heal) and number < self.given.healed_seeds
                if self.given.only is None:
                    self.line("none", lambda: self.loaded.model)
                    if self.heals:
                        self.healed("none", lambda: self.loaded.model)
                for asked in todo:
                    if number == 0 or not asked.once:
                        self.convert(asked)
        except TimeoutError:
            return False
        return True

    def convert(self, asked: Asked) -> None:
        method, title = asked.method, asked.title
        made = Lazy(lambda: self.make(asked))
        self.line(title, made)
        if method.lesson is not None:
            if asked.healed and asked.untaught and self.heals:
                self.healed(title, made)
            title, made = f"{title}, {TAUGHT}", Lazy(lambda model=made: self.teach(method, copy.deepcopy(model())))
            self.line(title, made, steps=self.setting.steps)
        if asked.healed and self.heals:
            self.healed(title, made)

    def healed(self, title: str, made: Callable[[], Any]) -> None:
        self.line(f"{title}, {HEALED}", lambda: self.heal(copy.deepcopy(made())), healed=self.given.heal)

    def make(self, asked: Asked) -> Any:
        torch.manual_seed(self.number)
        return asked.method.make(self.loaded.model, asked.value, self.seed().rows)

    def teach(self, method: Method, made: Any) -> Any:
        assert method.lesson is not None
        with tempfile.TemporaryDirectory() as folder:
            seed = self.seed()
            return method.lesson(made, self.loaded.model, seed.learnt, seed.rows, Path(folder) / "kept", silent)

    def heal(self, model: Any) -> Any:
        setting = self.setting
        plan = Healing(self.given.heal, setting.rate, setting.sizes.length, setting.batch, seed=self.number)
        return heal(model, self.seed().learnt, plan)

    def line(self, title: str, made: Callable[[], Any], **more: Any) -> None:
        """A row where there is none yet; TimeoutError where it may not begin any more."""
        if any((line["conversion"], line["seed"]) == (title, self.number) for line in self.lines):
            return
        if self.until is not None and time.monotonic() > self.until:
            raise TimeoutError
        began = time.process_time()
        model = made()
        making = time.process_time() - began
        found = self.seed().figures(model)
        took = time.process_time() - began
        line = {"conversion": title, "seed": self.number, **more, **found, "make_s": making, "took_s": took}
        self.lines.append(line)
        told = {key: round(found[key], 3) for key in ("bits_per_token", "kl_bits", "passkeys")}
        print(f"{title}, seed {self.number}: {told}, {took:.0f} s", flush=True)
        self.save()

    def save(self, *, tell: bool = False) -> None:
        rows = judged(self.loaded, self.lines)
        if self.given.dry:
            if tell:
                print(*rows, sep="\n")
            return
        again = {line["conversion"] for line in self.lines} | {row["claim"] for row in rows}
        kept = [] if self.given.only is None else [
            row for row in held() if row["model"] == self.name and _named(row) not in again
        ]  # fmt: skip
        mine = [{"model": self.name, **line} for line in [*self.lines, *rows]]
        save("convert", "cpu", [row for row in held() if row["model"] != self.name] + kept + mine, tell=tell)


class Lazy:
    """What a call gives, computed once and only if it is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    @cached_property
    def found(self) -> Any:
        return self.make()

    def __call__(self) -> Any:
        return self.found


def known_lines(name: str, given: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Rows of an earlier run of this commit, as much healed and taught."""
    if given.only is not None or environment()["commit"] != committed():
        return []
    return [
        {key: value for key, value in row.items() if key != "model"}
        for row in held()
        if row["model"] == name and row.get("seed", setting.seeds) < setting.seeds
        and row.get("healed", given.heal) == given.heal and row.get("steps", setting.steps) == setting.steps
    ]  # fmt: skip


def _named(row: dict[str, Any]) -> str:
    return str(row.get("conversion", row.get("claim")))


def _held() -> dict[str, Any]:
    path = RESULTS / "convert.json"
    if not path.is_file():
        return {"environment": {"commit": ""}, "rows": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def committed() -> str:
    return str(_held()["environment"]["commit"])


def held() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _held()["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, hub name or smollm2; else the packaged model")
    parser.add_argument("--heal", type=int, default=0, help="tokens; none without it")
    parser.add_argument("--healed-seeds", type=int, default=1, help="seeds of which it is healed too")
    parser.add_argument("--seeds", type=int, help="3; 1 for a large model")
    parser.add_argument("--transfer", type=int, help="steps of attention transfer")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no row after so many; no end without it")
    parser.add_argument("--tiny", action="store_true", help="few and short windows: to see that it runs, with --dry")
    parser.add_argument("--only", help="a part of the titles of those to run; the others keep what is held")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    given = parser.parse_args()
    if given.tiny and not given.dry:
        parser.error("--tiny is to see that it runs: give --dry with it")
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    setting = TINY if given.tiny else LARGE if loaded.model.num_parameters() >= MANY else SMALL
    asked = {"seeds": given.seeds, "steps": given.transfer}
    setting = replace(setting, **{key: value for key, value in asked.items() if value is not None})
    todo = [one for one in conversions(loaded, setting.steps) if given.only is None or given.only in one.title]
    if not todo:
        parser.error(f"--only {given.only!r}: it is in no title")
    bench = Bench(loaded, given, setting)
    whole = bench.run(todo)
    bench.save(tell=whole)
    if not whole:
        print(f"{given.minutes:g} minutes are over: the same command goes on with what is not measured yet")


if __name__ == "__main__":
    main()
