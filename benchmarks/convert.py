"""What every conversion of a checkpoint costs, before and after some healing, beside the original healed alike.

    python benchmarks/convert.py                      # the packaged model, three seeds, no healing; 25 minutes
    python benchmarks/convert.py --heal 200000        # and one seed healed with so many tokens, a control beside it
    python benchmarks/convert.py --only rotary        # those whose title has the word, beside what is held
    python benchmarks/convert.py --speeds             # what transfer, linear steps and shifts take; a minute
    python benchmarks/convert.py --speeds --model smollm2    # transfer alone, on a real model; some minutes

    python benchmarks/convert.py --model smollm2 --heal 500000   # the same of a real model; hours
    python benchmarks/convert.py --tiny --dry --seeds 2 --transfer 2   # that it runs; a minute

Seeds draw the text between hidden keys and what is random: the heads of `random`. The text that is measured is the same
for all, held out from what calibrates and heals. Rows are saved as they come: the same command at the same commit goes
on. A row with a claim says whether the order of damage that the papers report is there in every seed, by KL.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, save
from manyheads import create_attention
from manyheads.convert.cases import case_spec
from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted
from manyheads.convert.imitation import transfer
from manyheads.convert.layout import cache_numbers
from manyheads.convert.method import Method
from manyheads.convert.methods import Grouped, Hosted, Latent, Pruned
from manyheads.convert.report import TAUGHT
from manyheads.convert.shifted import powers_of_two
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions, library_text
from manyheads.runs.environment import environment
from manyheads.runs.steps import Tell, silent

MEASURES = (
    "src/manyheads/convert",
    "src/manyheads/hosts",
)

WRITES = ("convert", "convert_speeds")

FIGURES = ("bits_per_token", "kl_bits", "passkeys")
# Steps of attention transfer, a window of text each.
STEPS = 200
HEDGEHOG = {"name": "hedgehog"}


@dataclass(frozen=True)
class Asked:
    """method and how far. healed: whether it is healed too. drawn: whether a seed says what is made."""

    method: Method
    value: int
    healed: bool = False
    drawn: bool = False

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
    found: list[Asked] = []
    for count in fewer:
        first = count == fewer[0]
        found += [Asked(Grouped(align), count, first and align != "first") for align in ("procrustes", "mean", "first")]
        found.append(Asked(Grouped("random"), count, drawn=True))
    exact, fitted = Latent("exact"), Latent("fitted")
    found += [Asked(exact, exact.within(loaded.model, half)), Asked(fitted, fitted.within(loaded.model, half), True)]
    found.append(Asked(exact, exact.within(loaded.model, half) // 3))
    size = int(loaded.config.head_dim)
    for rope, fold in ((size, 2), (size // 2, 1), (size // 2, 2), (size // 2, 4)):
        turned = Latent(rope_dim=rope, fold=fold)
        found.append(Asked(turned, turned.within(loaded.model, half)))
    some = layers * heads * 3 // 4
    found += [Asked(Pruned(by), some, by == "importance", drawn=by == "random") for by in ("importance", "random")]
    # One loss for every head and row: of a model with hundreds of heads that is hours.
    few = layers * heads <= 64
    found += [Asked(Pruned(by), some) for by in ("ablation", "alone") if few]
    found += [Asked(Pruned(by, uniform=False), some) for by in ("importance", "normalised")]
    every = tuple(range(layers))
    for window in (64, None):
        spec = case_spec(HEDGEHOG, heads, window=window)
        found.append(Asked(Hosted(spec, every, steps, "heads"), layers, window is not None))
    moh = case_spec({"name": "moh"}, heads, active=round(0.75 * heads) / heads)
    found.append(Asked(Hosted(moh, every), layers, True))
    return found


def claims(loaded: Loaded) -> list[tuple[str, list[str]]]:
    """What the papers report, and the conversions of which each is to cost less than the next."""
    groups, half = loaded.config.num_key_value_heads, cache_numbers(loaded.model) // 2
    fewer = [g for g in range(1, groups) if groups % g == 0][::-1]
    exact = Latent("exact")
    found = [
        (f"aligned < mean < first < random heads, {count} left",
         [Asked(Grouped(align), count).title for align in ("procrustes", "mean", "first", "random")])
        for count in fewer
    ]  # fmt: skip
    if 2 * fewer[0] == groups:
        latent = Asked(exact, exact.within(loaded.model, half)).title
        found.append(("a latent < fewer heads, at equal bytes", [latent, Asked(Grouped("procrustes"), fewer[0]).title]))
    layers, heads = loaded.config.num_hidden_layers, loaded.config.num_attention_heads
    for window in (64, None):
        hedgehog = Asked(Hosted(case_spec(HEDGEHOG, heads, window=window), tuple(range(layers))), layers).title
        found.append((f"with transfer < without, window {window or 'none'}", [f"{hedgehog}, {TAUGHT}", hedgehog]))
    important, random = (Asked(Pruned(by), layers * heads * 3 // 4).title for by in ("importance", "random"))
    found.append(("heads by importance < by chance", [important, random]))
    return found


def judged(loaded: Loaded, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each claim whose conversions are all there: KL by seed, and whether every seed has the order."""
    known = {line["conversion"]: line["kl_of"] for line in lines if "kl_of" in line}
    rows = []
    for claim, titles in claims(loaded):
        if not all(title in known for title in titles):
            continue
        seeds = list(zip(*(known[title] for title in titles), strict=True))
        shows = all(a < b for seed in seeds for a, b in itertools.pairwise(seed))
        rows.append(
            {"claim": claim, "conversions": titles, "kl_by_seed": [list(seed) for seed in seeds], "shows": shows}
        )
    return rows


class Bench:
    """Rows of one model, each saved as it comes; those that the same commit holds already are not measured again."""

    def __init__(self, loaded: Loaded, given: argparse.Namespace) -> None:
        self.loaded, self.given, self.name = loaded, given, given.model or "byte_llama"
        sizes = Sizes(windows=2, keys=2, length=192, key_length=192) if given.tiny else Sizes()
        self.judges = [Judge(loaded, Questions(loaded, seed=seed), sizes) for seed in range(given.seeds)]
        self.learnt = Questions(loaded, text=library_text(), where="the library", seed=100)
        self.rows = calibration_rows(self.learnt, 768 if given.tiny else 8192, sizes.length)
        rate = 1e-3 if loaded.model.num_parameters() < 1e7 else 1e-4
        self.plan = Healing(given.heal, rate, sizes.length)
        self.lines: list[dict[str, Any]] = [] if given.dry else known_lines(self.name, given)

    def run(self, todo: list[Asked]) -> None:
        if self.given.only is None:
            self.line("none", lambda: [self.loaded.model])
        if self.given.heal and self.given.only is None:
            control = Lazy(lambda: self.heal(copy.deepcopy(self.loaded.model)))
            self.line("none, healed", lambda: [control()], healed=self.given.heal)
        for asked in todo:
            self.convert(asked)

    def convert(self, asked: Asked) -> None:
        method, title, count = asked.method, asked.title, len(self.judges)
        made = Lazy(lambda: [self.make(asked, seed) for seed in range(count if asked.drawn else 1)])
        self.line(title, made)
        last = Lazy(lambda: made()[0])
        if method.lesson is not None:
            title, last = f"{title}, {TAUGHT}", Lazy(lambda model=last: self.teach(method, model()))
            self.line(title, lambda model=last: [model()], steps=self.given.transfer)
        if self.given.heal and asked.healed:
            healed = Lazy(lambda model=last: self.heal(model()))
            self.line(f"{title}, healed", lambda: [healed()], healed=self.given.heal)

    def make(self, asked: Asked, seed: int) -> Any:
        torch.manual_seed(seed)
        return asked.method.make(self.loaded.model, asked.value, self.rows)

    def teach(self, method: Method, made: Any) -> Any:
        assert method.lesson is not None
        with tempfile.TemporaryDirectory() as folder:
            return method.lesson(made, self.loaded.model, self.learnt, self.rows, Path(folder) / "kept", silent)

    def heal(self, model: Any) -> Any:
        return heal(model, self.learnt, self.plan)

    def line(self, title: str, made: Callable[[], list[Any]], **more: Any) -> None:
        """A row where there is none yet. made: one model, or one for each seed."""
        if any(line["conversion"] == title for line in self.lines):
            return
        began = time.process_time()
        models = made()
        seconds = time.process_time() - began
        line = {"conversion": title, "make_s": seconds, **more, **scores(models, self.judges)}
        self.lines.append(line)
        print({key: line[key] for key in ("conversion", *FIGURES)}, flush=True)
        self.save()

    def save(self, *, tell: bool = False) -> None:
        rows = judged(self.loaded, self.lines)
        if self.given.dry:
            print(*rows if tell else (), sep="\n")
            return
        again = {line["conversion"] for line in self.lines}
        kept = [] if self.given.only is None else [
            r for r in held("convert") if r["model"] == self.name and r.get("conversion", again) not in again
        ]  # fmt: skip
        mine = [{"model": self.name, **line} for line in [*self.lines, *rows]]
        save("convert", "cpu", of_others("convert", self.name) + kept + mine, tell=tell)


class Lazy:
    """What a call gives, computed once and only if it is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    @cached_property
    def found(self) -> Any:
        return self.make()

    def __call__(self) -> Any:
        return self.found


def known_lines(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier run of this commit, as much healed and taught."""
    if given.only is not None or environment()["commit"] != committed("convert"):
        return []
    return [
        {key: value for key, value in row.items() if key != "model"}
        for row in held("convert")
        if row["model"] == name and len(row.get("kl_of", ())) == given.seeds
        and row.get("healed", given.heal) == given.heal and row.get("steps", given.transfer) == given.transfer
    ]  # fmt: skip


def scores(models: list[Any], judges: list[Judge]) -> dict[str, Any]:
    """models: one for all judges, or one for each."""
    each = models if len(models) == len(judges) else models * len(judges)
    found = [judge.measure(model) for judge, model in zip(judges, each, strict=True)]
    size = next(models[0].parameters()).element_size()
    return {
        "cache": found[0]["cache_bytes"] // (found[0]["tokens"] * size),
        "parameters": found[0]["parameters"],
        "bits_per_token": statistics.fmean(one["bits_per_token"] for one in found),
        "kl_bits": statistics.fmean(one["kl_bits"] for one in found),
        "kl_of": [one["kl_bits"] for one in found],
        "passkeys": statistics.fmean(one["passkeys"] / one["keys"] for one in found),
        "passkeys_of": [one["passkeys"] for one in found],
        "keys": found[0]["keys"],
    }


def transfer_speeds(loaded: Loaded, *, length: int = 512, steps: int = 3) -> dict[str, Any]:
    """Tokens of attention transfer and of full healing in a second of one core, in the same converted layers, a row to
    a step. The first step of each, and what is made before it, are left out."""
    learnt = Questions(loaded, text=library_text(), where="the library", seed=100)
    rows = calibration_rows(learnt, length * (steps + 1), length)
    count = loaded.config.num_hidden_layers
    made = hosted(loaded.model, {"name": "hedgehog", "window": 64}, range(count))
    plan = Healing(length * (steps + 1), 1e-4, length, 1)

    def learning(tell: Tell) -> None:
        transfer(made, loaded.model, range(count), rows, steps=steps + 1, loss="heads", tell=tell)

    fast, slow = (
        length / statistics.median(step_seconds(run))
        for run in (learning, lambda tell: heal(made, learnt, plan, tell=tell))
    )
    return {"measured": "transfer", "transfer_per_s": fast, "healing_per_s": slow, "ratio": fast / slow}


def step_seconds(run: Callable[[Tell], Any]) -> list[float]:
    """Seconds of the processor between what a training tells after each step."""
    at: list[float] = []
    run(lambda done, steps, text: at.append(time.process_time()))
    return [after - before for before, after in itertools.pairwise(at)]


@torch.no_grad()
def step_times(*, dim: int = 256, heads: int = 8, steps: int = 20) -> list[dict[str, Any]]:
    """Milliseconds of one decoded token, and bytes of the state, behind contexts from 1k to 64k tokens."""
    lines = []
    specs: list[dict[str, Any]] = [{"name": "hedgehog", "window": 64}, {"name": "softmax"}]
    for spec in specs:
        module = create_attention(dim=dim, heads=heads, causal=True, **spec).eval()
        for context in (1 << 10, 1 << 12, 1 << 14, 1 << 16):
            state = module.init_state(1, capacity=context + steps + 1)
            x = torch.randn(1, 1 << 10, dim)
            for _ in range(context >> 10):
                if spec["name"] == "softmax" and state.length:
                    _lengthen(state)
                    continue
                module(x, state=state)
            token, times = torch.randn(1, 1, dim), []
            for _ in range(steps):
                began = time.process_time()
                module(token, state=state)
                times.append(time.process_time() - began)
            ms = 1e3 * statistics.median(times)
            lines.append({"measured": "step", **spec, "context": context, "ms": ms, "bytes": state.nbytes})
    return lines


def _lengthen(state: Any) -> None:
    """A cache of softmax as long as after one more pass of a thousand tokens, without its quadratic prefill."""
    for name in ("keys", "values"):
        rows = state.grown[name].view()
        state.append(name, rows[:, :, : 1 << 10].clone())
    state.advance(1 << 10)


@torch.no_grad()
def shift_times(*, size: int = 512, tokens: int = 64, repeats: int = 5) -> list[dict[str, Any]]:
    """A linear layer three ways: products, the same weights rounded to powers of two, and shifts of integers."""
    weight, x = torch.randn(size, size) / size**0.5, torch.randn(tokens, size)
    rounded = powers_of_two(weight)
    fixed, signs = (x * (1 << 16)).int(), rounded.sign().int()
    shifts = -rounded.abs().clamp(min=2.0**-15).log2().int()

    def shifting() -> torch.Tensor:
        rows = [((fixed[:, None] >> shifts[i][None, None]) * signs[i]).sum(-1) for i in range(size)]
        return torch.cat(rows, 1) / (1 << 16)

    ways = {"products": lambda: x @ weight.T, "rounded": lambda: x @ rounded.T, "shifts": shifting}
    lines = []
    for way, run in ways.items():
        run()
        times = []
        for _ in range(repeats):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
        size_bytes = weight.numel() * 4 if way == "products" else weight.numel() * 5 // 8
        lines.append(
            {"measured": "shift", "way": way, "ms": 1e3 * statistics.median(times), "weight_bytes": size_bytes}
        )
    apart = float((shifting() - x @ rounded.T).abs().max() / (x @ rounded.T).abs().max())
    if apart > 0.01:
        raise RuntimeError(f"shifts of integers differ from the rounded layer by {apart:.2g}: no figure is worth it")
    return lines


def speeds(loaded: Loaded) -> list[dict[str, Any]]:
    """Of the layers alone with the packaged model only: they are the same for all."""
    alone = [*step_times(), *shift_times()] if loaded.model.num_parameters() < 1e7 else []
    return [transfer_speeds(loaded), *alone]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, hub name or smollm2; else the packaged model")
    parser.add_argument("--heal", type=int, default=0, help="tokens; none without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--transfer", type=int, default=STEPS, help="steps of attention transfer")
    parser.add_argument("--tiny", action="store_true", help="few and short windows: to see that it runs, with --dry")
    parser.add_argument("--only", help="a part of the titles of those to run; the others keep what is held")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    parser.add_argument("--speeds", action="store_true", help="only what transfer, linear steps and shifts take")
    given = parser.parse_args()
    if given.tiny and not given.dry:
        parser.error("--tiny is to see that it runs: give --dry with it")
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    name = given.model or "byte_llama"
    if given.speeds:
        lines = speeds(loaded)
        for line in lines:
            print(line, flush=True)
        if not given.dry:
            save(
                "convert_speeds", "cpu", of_others("convert_speeds", name) + [{"model": name, **line} for line in lines]
            )
        return
    todo = [one for one in conversions(loaded, given.transfer) if given.only is None or given.only in one.title]
    if not todo:
        parser.error(f"--only {given.only!r}: it is in no title")
    bench = Bench(loaded, given)
    bench.run(todo)
    bench.save(tell=True)


def committed(results: str) -> str:
    path = RESULTS / f"{results}.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["environment"]["commit"]) if path.is_file() else ""


def held(results: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{results}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def of_others(results: str, name: str) -> list[dict[str, Any]]:
    return [row for row in held(results) if row["model"] != name]


if __name__ == "__main__":
    main()
