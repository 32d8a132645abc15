"""What a conversion cost: text, distance to the original, hidden keys, bytes of cache, parameters, and time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import cache_of, with_cache
from manyheads.convert.layout import in_eval
from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions, Trial
from manyheads.runs.steps import Tell, silent

# Windows whose second half is written greedily, tokens of it, turns of timing and tokens of a turn.
GREEDY_ROWS, GREEDY_TOKENS, TURNS, TIMED_TOKENS = 4, 32, 3, 9
# Bytes of the original's answers that are held for the next model; what is beyond is computed again.
HELD = 1 << 28


@dataclass(frozen=True)
class Sizes:
    """windows of text of `length` tokens, and keys hidden in `key_length` tokens at depths spread from 0 to 1."""

    windows: int = 8
    length: int = 512
    keys: int = 10
    key_length: int = 512


class Judge:
    """The same text and the same hidden keys for every model that it is shown; the original's answers are kept."""

    def __init__(self, loaded: Loaded, questions: Questions, sizes: Sizes) -> None:
        self.sizes = sizes
        self.windows = [torch.tensor(row) for row in questions.windows(sizes.length, sizes.windows)]
        span = max(1, sizes.keys - 1)
        self.trials = [questions.passkey(sizes.key_length, n / span, n) for n in range(sizes.keys)]
        self.needles = [questions.needle(sizes.key_length, n / span, n) for n in range(sizes.keys)]
        self.original = loaded.model
        self._known: dict[int, Tensor] = {}

    @property
    def steps(self) -> int:
        return len(self.windows) + len(self.trials) + len(self.needles) + 2

    @torch.no_grad()
    def measure(self, model: Any, tell: Tell = silent) -> dict[str, float | int]:
        """bits per token of held-out text, KL in bits to the original (0 for itself), how often both think the same
        token likeliest, the share of greedy text before the first other token, hidden keys told (all digits likeliest,
        given those before), parameters, bytes of cache, and times as shares of the original's, taken by turns."""
        with in_eval(model, self.original):
            return self._measured(model, tell)

    def _measured(self, model: Any, tell: Tell) -> dict[str, float | int]:
        begun = time.perf_counter()
        text = self.distance(model, tell)
        done = len(self.windows)
        told = []
        for trial in (*self.trials, *self.needles):
            told.append(answers(model, trial))
            done += 1
            tell(done, self.steps, "")
        alike = self._same_greedy_text(model)
        tell(done + 1, self.steps, "")
        times = self._times(model)
        tell(done + 2, self.steps, "")
        whole, half = (cache_bytes(model, self.windows[0][: self.sizes.length // k]) for k in (1, 2))
        return {
            **text,
            "greedy_agreement": alike,
            "passkeys": sum(told[: len(self.trials)]),
            "needles": sum(told[len(self.trials) :]),
            "keys": len(self.trials),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cache_bytes": whole,
            "cache_bytes_per_token": (whole - half) / (self.sizes.length - self.sizes.length // 2),
            **times,
            "windows": len(self.windows),
            "tokens": len(self.windows[0]),
            "seconds": time.perf_counter() - begun,
        }

    @torch.no_grad()
    def distance(self, model: Any, tell: Tell = silent) -> dict[str, float]:
        """What `measure` says of the windows: bits per token, KL to the original, and the share of likeliest tokens
        that both have."""
        with in_eval(model, self.original):
            return self._distance(model, tell)

    def _distance(self, model: Any, tell: Tell) -> dict[str, float]:
        bits, apart, agree = [], [], []
        for i, row in enumerate(self.windows):
            other = self._original(i)
            own = other if model is self.original else _log_probabilities(model, row)
            bits.append(float(-own[:-1].gather(1, row[1:, None]).double().mean()) / math.log(2))
            apart.append(float((other.exp() * (other - own)).sum(1).mean()) / math.log(2))
            agree.append(float((own.argmax(1) == other.argmax(1)).double().mean()))
            tell(i + 1, self.steps, "")
        found = {"bits_per_token": bits, "kl_bits": apart, "top_agreement": agree}
        means = {key: sum(each) / len(each) for key, each in found.items()}
        return {**means, "kl_bits": max(0.0, means["kl_bits"])}

    def _original(self, i: int) -> Tensor:
        """Its log-probabilities of window i, held as long as there is room."""
        found = self._known.get(i)
        if found is None:
            found = _log_probabilities(self.original, self.windows[i])
            if found.nbytes + sum(one.nbytes for one in self._known.values()) <= HELD:
                self._known[i] = found
        return found

    def _same_greedy_text(self, model: Any) -> float:
        if model is self.original:
            return 1.0
        same = self._greedy_text(model) == self._original_text
        return float(same.long().cumprod(1).double().mean())

    @cached_property
    def _original_text(self) -> Tensor:
        return self._greedy_text(self.original)

    def _greedy_text(self, model: Any) -> Tensor:
        rows = torch.stack(self.windows[:GREEDY_ROWS])
        return go_on(model, rows[:, : rows.shape[1] // 2], GREEDY_TOKENS)[0]

    def _times(self, model: Any) -> dict[str, float]:
        """Seconds of the prompt and of a token after it, and what they are of the original's."""
        prompt = self.windows[0][None]
        sides = [model] if model is self.original else [model, self.original]
        taken = [[go_on(each, prompt, TIMED_TOKENS)[1] for each in sides] for _ in range(TURNS)]
        found: dict[str, float] = {}
        for k, what in enumerate(("prefill", "decode")):
            own, *other = (median(turn[side][k] for turn in taken) for side in range(len(sides)))
            found |= {f"{what}_s": own, f"{what}_ratio": own / other[0] if other else 1.0}
        return found


@torch.no_grad()
def go_on(model: Any, prompts: Tensor, count: int) -> tuple[Tensor, tuple[float, float]]:
    """The likeliest tokens after prompts [b, n], as [b, count], and the seconds of the prompt and of a later token."""
    ids, cache = prompts.to(model.device), None
    tokens, seconds = [], []
    for _ in range(count):
        settle(ids.device)
        begun = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1, **with_cache({}, cache))
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), cache_of(out)
        settle(ids.device)
        seconds.append(time.perf_counter() - begun)
        tokens.append(ids.cpu())
    return torch.cat(tokens, 1), (seconds[0], median(seconds[1:]))


def settle(device: torch.device) -> None:
    """A CUDA device runs behind the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _log_probabilities(model: Any, row: Tensor) -> Tensor:
    """[n, vocabulary], in float32 at least."""
    logits = model(row[None].to(model.device), use_cache=False).logits[0]
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def answers(model: Any, trial: Trial) -> bool:
    """Whether greedy decoding would give every answer."""
    ids = torch.tensor([trial.prefix + trial.tail], device=model.device)
    spans = [(len(trial.prefix) + start, len(trial.prefix) + stop) for start, stop in trial.answers]
    keep = ids.shape[1] - spans[0][0] + 1
    best = model(ids, use_cache=False, logits_to_keep=keep).logits[0].argmax(-1).tolist()
    first = ids.shape[1] - keep
    return all(best[start - 1 - first : stop - 1 - first] == ids[0, start:stop].tolist() for start, stop in spans)


def calibration_rows(questions: Questions, tokens: int, length: int) -> Sequence[list[int]]:
    """Windows of the text, `tokens` in all. ValueError where the text is shorter."""
    rows = questions.windows(length, max(1, tokens // length))
    if len(rows) * length < tokens // length * length:
        raise ValueError(
            f"{questions.where} has {len(rows) * length} tokens for calibration in windows of {length}; --calibrate "
            f"{tokens} was asked: give a longer text, or --calibrate {len(rows) * length}"
        )
    return rows


@torch.no_grad()
def cache_bytes(model: Any, row: Tensor) -> int:
    """What the model's own cache holds after these tokens, measured: rows of tokens, without room ahead."""
    cache = cache_of(model(row[None].to(model.device), use_cache=True, logits_to_keep=1))
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
