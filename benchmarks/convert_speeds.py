"""What conversions take: attention transfer beside full healing, steps after and before, and what shifts take.

    python benchmarks/convert_speeds.py                     # the packaged model
    python benchmarks/convert_speeds.py --model smollm2     # a real model: transfer and steps

Targets (`met` says whether): 100 steps of transfer over the command's own 16 rows of 512 tokens at least three times
the tokens a second of full healing; a step of the latent at most as long as one of as many bytes in fewer key/value
heads; a linear layer's step behind 64k tokens at most 1.2 times the one behind 1k. Processor time of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, save
from manyheads import create_attention
from manyheads.convert.damage import calibration_rows
from manyheads.convert.grouped import grouped
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted
from manyheads.convert.imitation import transfer
from manyheads.convert.latent import latent
from manyheads.convert.layout import cache_numbers
from manyheads.convert.methods import Latent
from manyheads.convert.shifted import powers_of_two
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions, library_text
from manyheads.runs.steps import Tell

MEASURES = ("src/manyheads/convert", "src/manyheads/mechanisms/linear/hedgehog.py", "src/manyheads/functional")

# What `--transfer 100` takes with the usual --calibrate and --length.
STEPS, ROWS, LENGTH = 100, 16, 512
CONTEXT, TURNS = 8192, 11


def transfer_speeds(loaded: Loaded, *, length: int = LENGTH, rows: int = 4) -> dict[str, Any]:
    """Tokens of attention transfer and of full healing in a second of one core, in the same converted layers, a row to
    a step: on a row that is new, on one that comes back, and over `STEPS` steps of `ROWS` rows. The first step of each,
    and what is made before it, are left out."""
    learnt = Questions(loaded, text=library_text(), where="the library", seed=100)
    given = calibration_rows(learnt, length * rows, length)
    count = loaded.config.num_hidden_layers
    made = hosted(loaded.model, {"name": "hedgehog", "window": 64}, range(count))
    plan = Healing(length * rows, 1e-4, length, 1)

    def learning(tell: Tell) -> None:
        transfer(made, loaded.model, range(count), given, steps=2 * rows, loss="heads", tell=tell)

    taught = step_seconds(learning)
    new, again = (statistics.median(part) for part in (taught[: rows - 1], taught[rows - 1 :]))
    healing = statistics.median(step_seconds(lambda tell: heal(made, learnt, plan, tell=tell)))
    ratio = STEPS * healing / (ROWS * new + (STEPS - ROWS) * again)
    return {
        "measured": "transfer",
        "new_rows_per_s": length / new,
        "rows_again_per_s": length / again,
        "healing_per_s": length / healing,
        "ratio_of_new_rows": healing / new,
        "ratio": ratio,
        "target": 3.0,
        "met": ratio >= 3,
    }


@torch.no_grad()
def decode_steps(loaded: Loaded, *, context: int = CONTEXT, turns: int = TURNS) -> list[dict[str, Any]]:
    """A token behind `context` tokens through our cache: before, with a third (or a half) of the key/value heads, and
    with a latent of as many bytes, by turns. Caches are filled with what is drawn, which takes no less time."""
    source, groups = loaded.model, int(loaded.config.num_key_value_heads)
    fewer = max(g for g in range(1, groups) if groups % g == 0)
    rank = Latent(format="manyheads").within(source, cache_numbers(source) * fewer // groups)
    learnt = Questions(loaded, text=library_text(), where="the library", seed=100)
    rows = calibration_rows(learnt, 256, 128)
    models = {
        "before": hosted(source),
        f"gqa {fewer}": hosted(grouped(source, fewer, align="mean")),
        f"mla {rank}": latent(source, rank, format="manyheads", calibration=rows),
    }
    token, caches, times = torch.tensor([[1]]), {}, {}
    for name, model in models.items():
        cache = model(torch.tensor([list(range(16))]), use_cache=True).past_key_values
        for layer in cache.layers:
            for state in layer.self_attention.states.values():
                _lengthen(state, context - 16)
        model(token, past_key_values=cache, use_cache=True)
        caches[name], times[name] = cache, []
    for _ in range(turns):
        for name, model in models.items():
            began = time.process_time()
            model(token, past_key_values=caches[name], use_cache=True)
            times[name].append(time.process_time() - began)
    before, pooled = times["before"], times[f"gqa {fewer}"]
    lines = []
    for name, taken in times.items():
        line = {
            "measured": "decode", "way": name, "context": context, "ms": 1e3 * statistics.median(taken),
            "bytes": caches[name].nbytes, "ratio_to_before": _ratio(taken, before),
        }  # fmt: skip
        if name.startswith("mla"):
            apart = _ratio(taken, pooled)
            line |= {"ratio_to_gqa": apart, "target": 1.0, "met": apart <= 1}
        lines.append(line)
    return lines


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


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
        if spec["name"] == "hedgehog":
            grows = lines[-1]["ms"] / lines[0]["ms"]
            lines[-1] |= {"ratio_to_1k": grows, "target": 1.2, "met": grows <= 1.2}
    return lines


def _lengthen(state: Any, tokens: int = 1 << 10) -> None:
    """A cache as long as after one more pass of so many tokens, without its quadratic prefill. Rows are drawn."""
    for name, buffer in state.grown.items():
        rows = buffer.view()
        state.append(name, torch.randn(*rows.shape[:2], tokens, *rows.shape[3:], dtype=rows.dtype))
    state.advance(tokens)


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
    return [transfer_speeds(loaded), *decode_steps(loaded), *alone]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, hub name or smollm2; else the packaged model")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    name = Path(given.model).name if given.model else "byte_llama"
    lines = [{"model": name, **line} for line in speeds(loaded)]
    if given.dry:
        print(*lines, sep="\n")
        return
    path = RESULTS / "convert_speeds.json"
    held = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    save("convert_speeds", "cpu", [row for row in held if row["model"] != name] + lines)


if __name__ == "__main__":
    main()
