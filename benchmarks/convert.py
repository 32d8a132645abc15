"""What every conversion of a checkpoint costs, before and after some healing, beside the original healed alike.

    python benchmarks/convert.py                      # the packaged model, three seeds, no healing; some minutes
    python benchmarks/convert.py --heal 200000        # and one seed healed with so many tokens, a control beside it
    python benchmarks/convert.py --only rotary        # those whose title has the word, beside what is held
    python benchmarks/convert.py --speeds             # what transfer, linear steps and shifts take; a minute
    python benchmarks/convert.py --speeds --model smollm2    # transfer alone, on a real model; some minutes

Seeds draw the text between hidden keys, the random heads, and the batches of healing. The text that is measured is the
same for all, held out from what calibrates and heals.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from common import RESULTS, save
from manyheads import create_attention
from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted
from manyheads.convert.imitation import transfer
from manyheads.convert.layout import cache_numbers
from manyheads.convert.method import Method
from manyheads.convert.methods import Grouped, Latent, Pruned
from manyheads.convert.shifted import powers_of_two
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions, library_text
from manyheads.runs.steps import Tell

MEASURES = (
    "src/manyheads/convert",
    "src/manyheads/hosts",
)

FIGURES = ("bits_per_token", "kl_bits", "passkeys")


def conversions(loaded: Loaded) -> list[tuple[Method, int, bool]]:
    """Method, how far, and whether it is healed too."""
    groups, heads = loaded.config.num_key_value_heads, loaded.config.num_attention_heads
    layers, half = loaded.config.num_hidden_layers, cache_numbers(loaded.model) // 2
    fewer = [g for g in range(1, groups) if groups % g == 0][::-1]
    found: list[tuple[Method, int, bool]] = []
    for count in fewer:
        first = count == fewer[0]
        found += [(Grouped(align), count, first and align != "first") for align in ("procrustes", "mean", "first")]
        found += [(Grouped("random"), count, False)] * first
    exact, fitted = Latent("exact"), Latent("fitted")
    found += [(exact, exact.within(loaded.model, half), False), (fitted, fitted.within(loaded.model, half), True)]
    found += [(exact, exact.within(loaded.model, half) // 3, False)]
    size = int(loaded.config.head_dim)
    for rope, fold in ((size, 2), (size // 2, 1), (size // 2, 2), (size // 2, 4)):
        turned = Latent(rope_dim=rope, fold=fold)
        found += [(turned, turned.within(loaded.model, half), False)]
    found += [(Pruned(by), layers * heads * 3 // 4, by == "importance") for by in ("importance", "random")]
    found += [(Pruned(by), layers * heads * 3 // 4, False) for by in ("ablation", "alone")]
    found += [(Pruned(by, uniform=False), layers * heads * 3 // 4, False) for by in ("importance", "normalised")]
    return found


def measured(loaded: Loaded, method: Method, value: int, judges: list[Judge], rows: Any) -> tuple[dict[str, Any], Any]:
    began = time.process_time()
    torch.manual_seed(0)
    made = method.make(loaded.model, value, rows)
    seconds = time.process_time() - began
    return {"conversion": method.title(value), "convert_s": seconds, **scores(made, judges)}, made


def scores(model: Any, judges: list[Judge]) -> dict[str, Any]:
    found = [judge.measure(model) for judge in judges]
    each = next(model.parameters()).element_size()
    return {
        "cache": found[0]["cache_bytes"] // (found[0]["tokens"] * each),
        "parameters": found[0]["parameters"],
        "bits_per_token": found[0]["bits_per_token"],
        "kl_bits": found[0]["kl_bits"],
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
    parser.add_argument("--only", help="a part of the titles of those to run; the others keep what is held")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    parser.add_argument("--speeds", action="store_true", help="only what transfer, linear steps and shifts take")
    given = parser.parse_args()
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
    sizes = Sizes()
    judges = [Judge(loaded, Questions(loaded, seed=seed), sizes) for seed in range(given.seeds)]
    learnt = Questions(loaded, text=library_text(), where="the library", seed=100)
    rows = calibration_rows(learnt, 8192, sizes.length)
    plan = Healing(given.heal, rate=1e-3 if loaded.model.num_parameters() < 1e7 else 1e-4)
    todo = [one for one in conversions(loaded) if given.only is None or given.only in one[0].title(one[1])]
    if not todo:
        parser.error(f"--only {given.only!r}: it is in no title")
    lines: list[dict[str, Any]] = []
    if given.only is None:
        lines.append({"conversion": "none", **scores(loaded.model, judges)})
    if given.heal and given.only is None:
        control = heal(copy.deepcopy(loaded.model), learnt, plan)
        lines.append({"conversion": "none, healed", "healed": given.heal, **scores(control, judges)})
        del control
    for method, value, healing in todo:
        line, made = measured(loaded, method, value, judges, rows)
        lines.append(line)
        print({key: line[key] for key in ("conversion", *FIGURES)}, flush=True)
        if given.heal and healing:
            healed = heal(made, learnt, plan)
            title = f"{line['conversion']}, healed"
            lines.append({"conversion": title, "healed": given.heal, **scores(healed, judges)})
            print({key: lines[-1][key] for key in ("conversion", *FIGURES)}, flush=True)
    if given.dry:
        return
    again = {line["conversion"] for line in lines}
    kept = [] if given.only is None else [r for r in held("convert") if r["model"] == name]
    kept = of_others("convert", name) + [r for r in kept if r["conversion"] not in again]
    save("convert", "cpu", kept + [{"model": name, **line} for line in lines])


def held(results: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{results}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def of_others(results: str, name: str) -> list[dict[str, Any]]:
    return [row for row in held(results) if row["model"] != name]


if __name__ == "__main__":
    main()
