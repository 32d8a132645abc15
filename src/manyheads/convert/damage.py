"""What a conversion cost: text, distance to the original, hidden keys, and what the cache and the weights take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import Questions, Trial
from manyheads.runs.steps import Tell, silent


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
        self.original = loaded.model

    @property
    def steps(self) -> int:
        return len(self.windows) + len(self.trials)

    @torch.no_grad()
    def measure(self, model: Any, tell: Tell = silent) -> dict[str, float | int]:
        """bits per token of held-out text, KL in bits to the original (0 for itself), how often both think the same
        token likeliest, hidden keys told (all digits likeliest, given those before), parameters, and seconds."""
        bits, apart, agree = [], [], []
        begun, done = time.perf_counter(), 0
        for row in self.windows:
            own = _log_probabilities(model, row)
            other = own if model is self.original else _log_probabilities(self.original, row)
            bits.append(float(-own[:-1].gather(1, row[1:, None]).double().mean()) / math.log(2))
            apart.append(float((other.exp() * (other - own)).sum(1).mean()) / math.log(2))
            agree.append(float((own.argmax(1) == other.argmax(1)).double().mean()))
            done += 1
            tell(done, self.steps, "")
        right = 0
        for trial in self.trials:
            right += answers(model, trial)
            done += 1
            tell(done, self.steps, "")
        return {
            "bits_per_token": sum(bits) / len(bits),
            "kl_bits": max(0.0, sum(apart) / len(apart)),
            "top_agreement": sum(agree) / len(agree),
            "passkeys": right,
            "keys": len(self.trials),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cache_bytes": cache_bytes(model, self.windows[0]),
            "tokens": len(self.windows[0]),
            "seconds": time.perf_counter() - begun,
        }


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
    """Windows of the text, `tokens` in all; ValueError where it has not as many."""
    count = max(1, tokens // length)
    rows = questions.windows(length, count)
    if len(rows) < count:
        raise ValueError(
            f"{questions.where} has {len(rows) * length} tokens to calibrate with, and {tokens} were asked for: give a "
            "longer text or a smaller --calibrate"
        )
    return rows


@torch.no_grad()
def cache_bytes(model: Any, row: Tensor) -> int:
    """What the model's own cache holds after these tokens, measured: rows of tokens, without room ahead."""
    cache = model(row[None].to(model.device), use_cache=True, logits_to_keep=1).past_key_values
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
