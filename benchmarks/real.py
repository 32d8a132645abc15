"""Every policy on a real language model, beside transformers' DynamicCache: time, bytes, and what is lost.

    python benchmarks/real.py                          # smollm2, contexts 512, 2048 and 7900; about 15 minutes
    python benchmarks/real.py --contexts 512 --keys 1  # a quick look; --model FOLDER for another model

For each context one prompt of library text passes the model once under DynamicCache and once under all policies
together: what a policy drops after a prompt does not change the pass itself, so its prefill is that pass and its own
dropping. Then every cache is fed the same tail of text token by token (bits, KL to the dense cache), and all caches
decode in turns, which gives time per token as a ratio to DynamicCache in the same run. Keys are hidden at several
depths of further prompts and asked for token by token. One thread, times of that thread's own work.

Left out: Duo, Razor and MoA (they need a profile of the heads), LoCoCo (it is trained first), LongHeads (it reads whole
chunks of 256, three at least: see shrink_reading.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from common import here, kept, save
from manyheads.hosts.attend import pack
from manyheads.hosts.attention import attach, detach
from manyheads.hosts.generation import library_cache
from manyheads.hosts.loading import load_model
from manyheads.hosts.questions import Questions, Trial
from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    Full,
    KeyNorm,
    Policy,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    TidalDecode,
)
from manyheads.shrink.compress import Pass
from manyheads.shrink.measure import cache_bytes, step

MEASURES = (
    "src/manyheads/shrink",
    "src/manyheads/hosts",
)

RATIOS = (0.5, 0.75)
TAIL, WARM = 24, 2
# One-token steps by turns: short ones are more alike from cache to cache, and it takes more of them to tell.
STEPS, MOST_STEPS = 24, 96
DENSE = "DynamicCache"


def policies(context: int) -> dict[str, Policy]:
    """Titles and policies. Those that read a part keep everything, and read what the ratio leaves."""
    made: dict[str, Policy] = {"Full": Full()}
    for ratio in RATIOS:
        rest = round(context * (1 - ratio))
        made |= {
            f"StreamingLLM {ratio}": StreamingLLM(compression_ratio=ratio),
            f"SnapKV {ratio}": SnapKV(compression_ratio=ratio),
            f"AdaKV {ratio}": SnapKV(compression_ratio=ratio, allocation=AdaKV()),
            f"PyramidKV {ratio}": SnapKV(compression_ratio=ratio, allocation=PyramidKV()),
            f"KeyNorm {ratio}": KeyNorm(compression_ratio=ratio),
            f"TOVA {ratio}": TOVA(compression_ratio=ratio),
            f"H2O {ratio}": H2O(compression_ratio=ratio),
            f"ExpectedAttention {ratio}": ExpectedAttention(compression_ratio=ratio),
            f"TidalDecode {ratio}": TidalDecode(budget_tokens=rest),
        }
    return made


def clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def dense_pass(model: Any, tokens: Tensor) -> tuple[float, Any, Tensor]:
    detach(model)
    cache = library_cache(model)
    seconds, logits = clocked(lambda: step(model, tokens, cache))
    return seconds, cache, logits


def shared_pass(model: Any, tokens: Tensor, made: dict[str, Policy]) -> tuple[dict[str, Any], dict[str, float], Tensor]:
    """A cache of each policy after one pass of the prompt, and the seconds of that pass with its own dropping."""
    caches = {title: policy.make_cache(model) for title, policy in made.items()}
    first, *others = caches.values()
    dropping = dict.fromkeys(made, 0.0)
    for i, lead in enumerate(first.layers):
        _share(lead, {title: cache.layers[i] for title, cache in caches.items() if cache is not first}, dropping)
    seconds, logits = clocked(lambda: step(model, tokens, first))
    for lead in first.layers:
        del lead.update, lead.attend
    alone = seconds - sum(dropping.values())
    assert all(cache.get_seq_length() == tokens.shape[1] for cache in others)
    return caches, {title: alone + own for title, own in dropping.items()}, logits


def _share(lead: Any, rest: dict[str, Any], dropping: dict[str, float]) -> None:
    """What this layer of the first cache is given, the same layer of the others is given too."""
    update, attend = lead.update, lead.attend

    def update_all(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        for layer in rest.values():
            layer.update(keys, values)
        return update(keys, values, *args, **kwargs)

    def attend_all(query: Tensor, scoring: Any, seen: Any) -> Tensor:
        out: Tensor = attend(query, scoring, seen)
        for title, layer in rest.items():
            done = Pass(pack(query, sum(len(group.heads) for group in layer.store.groups)), scoring, seen)
            if layer.policy.reads:
                # What a reader notes of the prompt is made where it reads.
                seconds, _ = clocked(lambda layer=layer: attend_once(layer, query, scoring, seen))
            else:
                seconds, _ = clocked(lambda layer=layer, done=done: layer.finish(done))
            dropping[title] += seconds
        return out

    def attend_once(layer: Any, query: Tensor, scoring: Any, seen: Any) -> None:
        layer.attend(query, scoring, seen)

    lead.update, lead.attend = update_all, attend_all


def on(model: Any, title: str) -> None:
    """Every cache under the attention that it needs."""
    if title == DENSE:
        detach(model)
    else:
        attach(model)


def follow(model: Any, title: str, cache: Any, logits: Tensor, tail: list[int]) -> Iterator[Tensor]:
    """Log-probabilities [vocabulary] before each token of the tail; the cache then holds all but the last."""
    on(model, title)
    for i, token in enumerate(tail):
        yield logits[0].float().log_softmax(-1)
        if i + 1 < len(tail):
            logits = step(model, torch.tensor([[token]]), cache)


def text_figures(expected: Tensor, given: Tensor, tail: list[int]) -> dict[str, float]:
    kl = (expected.exp() * (expected - given)).sum(-1).mean()
    bits = -given[torch.arange(len(tail)), torch.tensor(tail)].mean() / math.log(2)
    return {"bits": float(bits), "kl_bits": max(0.0, float(kl)) / math.log(2)}


def in_turns(model: Any, caches: dict[str, Any], token: int, steps: int) -> dict[str, list[float]]:
    """Seconds of one-token steps, all caches by turns, the order turned round each time."""
    times: dict[str, list[float]] = {title: [] for title in caches}
    for turn in range(WARM + steps):
        for title in list(caches)[:: -1 if turn % 2 else 1]:
            on(model, title)
            seconds, _ = clocked(lambda title=title: step(model, torch.tensor([[token]]), caches[title]))
            if turn >= WARM:
                times[title].append(seconds)
    return times


def answered(model: Any, title: str, cache: Any, logits: Tensor, trial: Trial) -> bool:
    """Whether every token of the answer is what the model expects most."""
    ((start, stop),) = trial.answers
    told = [int(own.argmax()) for own in follow(model, title, cache, logits, trial.tail)]
    return told[start:stop] == trial.tail[start:stop]


def median_error(values: list[float]) -> float:
    """Standard error of their median, by the quartiles: a step that another process held up does not widen it."""
    low, _, high = statistics.quantiles(values, n=4)
    return math.sqrt(math.pi / 2 / len(values)) * (high - low) / 1.349


def context_rows(loaded: Any, context: int, keys: int) -> list[dict[str, Any]]:
    model, questions = loaded.model, Questions(loaded)
    made = policies(context)
    window = questions.windows(context + TAIL, 1)[0]
    prompt, tail = torch.tensor([window[:context]]), window[context:]
    dense_seconds, dense, logits = dense_pass(model, prompt)
    shared, prefill, shared_logits = shared_pass(model, prompt, made)
    torch.testing.assert_close(shared_logits, logits, rtol=1e-3, atol=1e-3)
    caches = {DENSE: dense, **shared}
    prefill = {DENSE: dense_seconds, **prefill}
    text = {title: torch.stack(list(follow(model, title, cache, logits, tail))) for title, cache in caches.items()}
    steps = max(STEPS, min(MOST_STEPS, STEPS * 2048 // context))
    times = in_turns(model, caches, tail[-1], steps)
    held = {title: cache_bytes(cache) for title, cache in caches.items()}
    del caches, shared, dense
    found = key_answers(model, questions, made, context, keys)
    rows = []
    for title in [DENSE, *made]:
        ratios = [own / other for own, other in zip(times[title], times[DENSE], strict=True)]
        rows.append({
            "context": context, "cache": title,
            "ms_per_token": 1e3 * statistics.median(times[title]),
            "ratio": statistics.median(ratios), "ratio_error": median_error(ratios), "steps": steps,
            "prefill_s": prefill[title], "prefill_ratio": prefill[title] / dense_seconds,
            "bytes": held[title], "bytes_ratio": held[title] / held[DENSE],
            **text_figures(text[DENSE], text[title], tail),
            "passkeys": found[title], "keys": keys,
        })  # fmt: skip
    return rows


def key_answers(model: Any, questions: Questions, made: dict[str, Policy], context: int, keys: int) -> dict[str, int]:
    """How many of the hidden keys each cache still answers."""
    found = dict.fromkeys([DENSE, *made], 0)
    for number in range(keys):
        trial = questions.passkey(context, (number + 0.5) / keys, number)
        prompt = torch.tensor([trial.prefix])
        shared, _, logits = shared_pass(model, prompt, made)
        dense = library_cache(model)
        for i, layer in enumerate(shared["Full"].layers):
            group = layer.store.groups[0]
            dense.update(group.view("keys").contiguous(), group.view("values").contiguous(), i)
        for title, cache in {DENSE: dense, **shared}.items():
            found[title] += answered(model, title, cache, logits, trial)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 7900])
    parser.add_argument("--keys", type=int, default=2, help="hidden keys per context; 0 asks for none")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    with torch.no_grad():
        for context in given.contexts:
            began = time.perf_counter()
            code = {"model": given.model, **here()}
            rows = [{**code, **row} for row in context_rows(loaded, context, given.keys)]
            print(f"context {context}: {time.perf_counter() - began:.0f} s", flush=True)
            if given.dry:
                for row in rows:
                    print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
            else:
                save("real", "cpu", [row for row in kept("real") if row["context"] != context] + rows)


if __name__ == "__main__":
    main()
