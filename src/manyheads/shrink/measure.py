"""What a shrunk cache costs: answers, next-token distributions and bytes against the dense cache's, time and memory.

The path is the one that generation takes: a prompt fills the cache in one pass, the policy drops what it drops, and
what follows comes token by token. policy None is transformers' own DynamicCache under the model's own attention.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from statistics import median
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import with_cache
from manyheads.hosts.device import device_of
from manyheads.hosts.generation import library_cache
from manyheads.hosts.questions import Trial
from manyheads.runs.memory import memory_meter, trim_memory
from manyheads.shrink.cache import RaggedCache
from manyheads.shrink.policy import Policy, release

# Tokens of all rows of a batch together; numbers of all logits that are held at once, a word of a row's token each.
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 16_384, 1 << 24
# Told, for every place of a tail, the logits of what is expected there.
See = Callable[[int, Tensor], None]


@contextmanager
def filled(model: Any, policy: Policy | None) -> Iterator[Any]:
    """A new cache of the policy, for as long as the model attends through it; or the dense cache."""
    if policy is None:
        yield library_cache(model)
        return
    cache = policy.make_cache(model)
    try:
        yield cache
    finally:
        release(model)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors held: ours counts its own, the library's are its layers' keys and values."""
    if isinstance(cache, RaggedCache):
        return int(cache.nbytes)
    rows = [row for layer in cache.layers for row in (layer.keys, layer.values) if isinstance(row, Tensor)]
    return sum(row.numel() * row.element_size() for row in rows)


def step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Logits [b, vocabulary] after the last of tokens [b, n]."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    out: Tensor = model(tokens, use_cache=True, **with_cache(last, cache)).logits
    return out[:, -1]


def steps(model: Any, tokens: Tensor, cache: Any) -> Iterator[Tensor]:
    """Logits [b, vocabulary] after each of tokens [b, n], which come in one pass."""
    if tokens.shape[1] == 1:
        yield step(model, tokens, cache)
    else:
        yield from model(tokens, use_cache=True, **with_cache({}, cache)).logits.unbind(1)


@torch.no_grad()
def follow(model: Any, policy: Policy | None, prefix: Tensor, tail: Tensor, see: See) -> int:
    """Fills a cache with prefix [b, n], then gives tail [b, t] token by token, to the dense cache some at once. see(i,
    logits [b, vocabulary]) is told what the model expects in the place of tail[:, i]. Returns the cache's bytes at the
    end."""
    with filled(model, policy) as cache:
        see(0, step(model, prefix, cache))
        _give(model, policy, tail, 0, cache, see)
        return cache_bytes(cache)


def _give(model: Any, policy: Policy | None, tail: Tensor, begin: int, cache: Any, see: See) -> None:
    """All of a tail from place `begin` on but its last token."""
    # A cache that drops nothing says of tokens that come together what it says of them one by one.
    many, last = 1, tail.shape[1] - 1
    if policy is None:
        words = model.config.get_text_config(decoder=True).vocab_size
        many = max(1, LOGITS_AT_ONCE // (len(tail) * words))
    for start in range(begin, last, many):
        given = tail[:, start : min(start + many, last)]
        for i, logits in enumerate(steps(model, given, cache), start + 1):
            see(i, logits)


@torch.no_grad()
def continuation(model: Any, policy: Policy | None, prefix: Tensor, count: int) -> Tensor:
    """[b, count]: what the model goes on with, always the likeliest token."""
    with filled(model, policy) as cache:
        tokens = [step(model, prefix, cache).argmax(-1, keepdim=True)]
        while len(tokens) < count:
            tokens.append(step(model, tokens[-1], cache).argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


@torch.no_grad()
def follow_and_go_on(
    model: Any, policy: Policy | None, prefix: Tensor, tail: Tensor, see: See, count: int
) -> tuple[int, Tensor]:
    """What `follow` and `continuation` give, of one prompt: rows that follow the tail, and beside them, until they are
    done, the same rows going on by themselves."""
    if not 1 < count <= tail.shape[1]:
        return follow(model, policy, prefix, tail, see), continuation(model, policy, prefix, count)
    rows = torch.arange(len(prefix), device=prefix.device)
    with filled(model, policy) as cache:
        logits = step(model, prefix, cache)
        see(0, logits)
        said = [logits.argmax(-1, keepdim=True)]
        cache.reorder_cache(rows.repeat(2))
        for i in range(1, count):
            logits = step(model, torch.cat([tail[:, i - 1 : i], said[-1]]), cache)
            see(i, logits[: len(rows)])
            said.append(logits[len(rows) :].argmax(-1, keepdim=True))
        cache.batch_select_indices(rows)
        _give(model, policy, tail, count - 1, cache, see)
        return cache_bytes(cache), torch.cat(said, 1)


# -- answers -------------------------------------------------------------------------------------------------------


def measure_answers(model: Any, policy: Policy | None, trials: Sequence[Trial]) -> dict[str, Any]:
    """Share of answers right in every token, given the right ones before it, which is when greedy decoding is right."""
    right: dict[float | None, list[bool]] = {}
    held = 0
    for batch in batches(trials):
        prefix, tail = (_tensor(model, [getattr(trial, part) for trial in batch]) for part in ("prefix", "tail"))
        hits = torch.zeros(tail.shape, dtype=torch.bool, device=tail.device)

        def see(i: int, logits: Tensor, hits: Tensor = hits, tail: Tensor = tail) -> None:
            hits[:, i] = logits.argmax(-1) == tail[:, i]

        held += follow(model, policy, prefix, tail, see)
        for row, trial in enumerate(batch):
            found = [bool(hits[row, start:stop].all()) for start, stop in trial.answers]
            right.setdefault(trial.depth, []).extend(found)
    every = [hit for hits_at in right.values() for hit in hits_at]
    depths = sorted(depth for depth in right if depth is not None)
    return {
        "accuracy": sum(every) / len(every),
        "answers": len(every),
        "by_depth": [[depth, sum(right[depth]) / len(right[depth])] for depth in depths],
        "cache_bytes": held / len(trials),
    }


def batches(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Trials of one shape together, as many as TOKENS_AT_ONCE allows."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((len(trial.prefix), len(trial.tail), trial.answers), []).append(trial)
    for (before, after, _), group in groups.items():
        size = max(1, TOKENS_AT_ONCE // (before + after))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _tensor(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, device=device_of(model))


# -- next tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the dense cache gives: log-probabilities [windows, tail, vocabulary], greedy tokens [windows, count]."""

    expected: Tensor
    greedy: Tensor
    cache_bytes: float


def windows_cut(windows: Sequence[Sequence[int]], tail: int) -> list[Trial]:
    return [Trial(list(ids[:-tail]), list(ids[-tail:]), ()) for ids in windows]


def take_reference(model: Any, trials: Sequence[Trial], greedy: int) -> Reference:
    expected, tokens, held = [], [], 0
    for batch in batches(trials):
        prefix, tail = (_tensor(model, [getattr(trial, part) for trial in batch]) for part in ("prefix", "tail"))
        rows: list[Tensor] = []

        def see(i: int, logits: Tensor, rows: list[Tensor] = rows) -> None:
            rows.append(_log(logits))

        size, said = follow_and_go_on(model, None, prefix, tail, see, greedy)
        held += size
        expected.append(torch.stack(rows, 1).cpu())
        tokens.append(said.cpu())
    return Reference(torch.cat(expected), torch.cat(tokens), held / len(trials))


def _log(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def measure_text(model: Any, policy: Policy | None, trials: Sequence[Trial], dense: Reference) -> dict[str, Any]:
    """Bits per token of the tails; for a policy also how far its expectations are from the dense cache's."""
    if policy is None:
        tails = torch.tensor([trial.tail for trial in trials])
        bits = -dense.expected.gather(2, tails[..., None]).mean().item() / math.log(2)
        return _text_outcome(bits, tails.numel()) | {"cache_bytes": dense.cache_bytes}
    sums, held, done, alike = torch.zeros(3, dtype=torch.float64), 0, 0, []
    count = sum(len(trial.tail) for trial in trials)
    for batch in batches(trials):
        prefix, tail = (_tensor(model, [getattr(trial, part) for trial in batch]) for part in ("prefix", "tail"))
        here = slice(done, done + len(batch))
        own = dense.expected[here]

        def see(i: int, logits: Tensor, own: Tensor = own, tail: Tensor = tail) -> None:
            found, wanted = _log(logits).cpu(), own[:, i]
            sums[0] -= found.gather(1, tail[:, i : i + 1].cpu()).double().sum()
            sums[1] += (wanted.exp() * (wanted - found)).double().sum()
            sums[2] += (wanted.argmax(-1) == found.argmax(-1)).sum()

        greedy = dense.greedy[here]
        size, said = follow_and_go_on(model, policy, prefix, tail, see, greedy.shape[1])
        held += size
        alike.append(agreed(said.cpu(), greedy))
        done += len(batch)
    nats, kl, top = (sums / count).tolist()
    return _text_outcome(nats / math.log(2), count) | {
        "kl_bits": max(0.0, kl) / math.log(2),
        "top_agreement": top,
        "greedy_agreement": torch.cat(alike).mean().item(),
        "greedy_tokens": dense.greedy.shape[1],
        "cache_bytes": held / len(trials),
    }


def agreed(given: Tensor, wanted: Tensor) -> Tensor:
    """[b]: the share of [b, count] tokens that come before the first other one."""
    return (given == wanted).double().cumprod(1).mean(1)


def _text_outcome(bits: float, tokens: int) -> dict[str, Any]:
    return {"bits_per_token": bits, "perplexity": 2**bits if bits < 1000 else math.inf, "tokens": tokens}


# -- time and memory -------------------------------------------------------------------------------------------------


@dataclass
class _Side:
    """One cache in a timed comparison."""

    policy: Policy | None
    prefill: list[float]
    decode: list[float]
    held: int = 0
    prefill_peak: int = 0
    decode_peak: int = 0


@torch.no_grad()
def measure_cost(model: Any, policy: Policy, prompt: Sequence[int], *, steps: int, repeats: int) -> dict[str, Any]:
    """Medians of prefill and of one decoded token, bytes held after them and the peaks of memory above the start, batch
    1; the dense cache by turns with the policy's, so that what else the machine does meets both."""
    tokens = _tensor(model, [prompt])
    gc.collect()
    sides = {"dense_": _Side(None, [], []), "": _Side(policy, [], [])}
    for repeat in range(repeats + 1):
        for side in sides.values():
            _run_once(model, side, tokens, steps, warm_up=repeat == 0)
    outcome: dict[str, Any] = {"prompt_tokens": len(prompt), "decoded_tokens": steps, "repeats": repeats}
    for name, side in sides.items():
        outcome |= {
            f"{name}prefill_s": median(side.prefill),
            f"{name}decode_s": median(side.decode),
            f"{name}cache_bytes": side.held,
            f"{name}prefill_peak_bytes": side.prefill_peak,
            f"{name}decode_peak_bytes": side.decode_peak,
        }
    return outcome


def _run_once(model: Any, side: _Side, tokens: Tensor, steps: int, warm_up: bool) -> None:
    trim_memory()
    meter = memory_meter(tokens.device)
    with filled(model, side.policy) as cache:
        prefill, logits = _timed(lambda: step(model, tokens, cache), tokens.device)
        prefill_peak = meter.peak()
        trim_memory()
        decoding, decode = memory_meter(tokens.device), []
        for _ in range(steps):
            token = logits.argmax(-1, keepdim=True)
            seconds, logits = _timed(partial(step, model, token, cache), tokens.device)
            decode.append(seconds)
        # Above the same start: what is held of the prompt counts.
        decode_peak = max(0, decoding.baseline + decoding.peak() - meter.baseline)
        side.held = cache_bytes(cache)
    if not warm_up:
        side.prefill.append(prefill)
        side.decode += decode
        side.prefill_peak = max(side.prefill_peak, prefill_peak)
        side.decode_peak = max(side.decode_peak, decode_peak)


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    _settled(device)
    began = time.perf_counter()
    found = call()
    _settled(device)
    return time.perf_counter() - began, found


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
