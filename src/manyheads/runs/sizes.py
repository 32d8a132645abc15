"""How much a run measures: chosen by what a first pass took, and kept in its folder, so that it goes on with the same.

A small model gets everything; a large one the first choice that fits into a time. What was asked for by hand stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch

from manyheads.runs.files import write_durably
from manyheads.runs.given import read_json
from manyheads.runs.progress import duration

FILE = "sizes.json"
_TRIED = 128
# How much longer a token takes among more than were tried, whose numbers leave a core's cache: 1.2 to 1.4 measured.
_LONG = 1.25
T = TypeVar("T")


class Speed:
    """Seconds of a model's passes on this machine, by what passes of a few tokens took: a part for reading the weights,
    however few the tokens, and a part for every token, which grows with the tokens before it as attention does."""

    def __init__(self, once: float, token: float, far: float) -> None:
        """once, token: seconds of a pass and of each of its tokens. far: tokens before it that cost as much again."""
        self.once, self.token, self.far = once, token, far

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, clock: Callable[[], float] | None = None) -> Speed:
        """Measured: one token, and some more; the better of two each, since the first pass warms up."""
        most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or _TRIED
        device = next(model.parameters()).device
        clock = clock or clock_of(device)
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        took: dict[int, float] = {}
        for n in (1, min(_TRIED, most)):
            ids = torch.ones(1, n, dtype=torch.long, device=device)
            run = partial(model, input_ids=ids, use_cache=False, **last)
            took[n] = min(_timed(run, device, clock) for _ in range(2))
        (_, once), (n, long) = min(took.items()), max(took.items())
        return cls(once, max(long - once, 0.0) / n or once, far(model))

    def read(self, tokens: int, rows: int = 1) -> float:
        """Seconds of a pass over rows of so many tokens."""
        each = self.token * (_LONG if rows * tokens > _TRIED else 1.0)
        return self.once + rows * each * tokens * (1 + tokens / self.far)

    def decoded(self, steps: int, rows: int = 1) -> float:
        """Seconds of so many passes of one token each."""
        return steps * (self.once + rows * self.token)


def clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU the time of its threads, so that what else the machine does changes no sizes."""
    if device.type == "cpu":
        return lambda: time.process_time() / torch.get_num_threads()
    return time.perf_counter


def _timed(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def far(model: Any) -> float:
    """Tokens at which scores and mixing cost what the weights do: 2 n d of a layer against 2 parameters."""
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", 1)
    words = getattr(config, "vocab_size", 0) * getattr(config, "hidden_size", 0)
    weights = sum(own.numel() for own in model.base_model.parameters()) - words
    return max(1.0, weights / max(1, layers * getattr(config, "hidden_size", 1)))


def first_within(choices: Sequence[T], seconds: Callable[[T], float], room: float) -> T:
    """The first choice that takes no more than the room; else the last, which is the smallest."""
    return next((own for own in choices if seconds(own) <= room), choices[-1])


def chosen_note(what: str, seconds: float) -> str:
    """'2 trials of 512 tokens, chosen for about 4 min; --thorough runs all'"""
    return f"{what}, chosen for about {duration(seconds)}; --thorough runs all"


def kept_sizes(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run in the folder chose for the same facts; None where there was none."""
    asked = json.loads(json.dumps(facts))
    return next((own["sizes"] for own in _kept(folder) if own["facts"] == asked), None)


def keep_sizes(folder: Path, facts: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    asked = json.loads(json.dumps(facts))
    runs = [own for own in _kept(folder) if own["facts"] != asked] + [{"facts": asked, "sizes": sizes}]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / FILE, (json.dumps({"runs": runs}, indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(f"cannot write {folder / FILE} ({error.strerror}): choose another --out") from error


def _kept(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE
    try:
        runs: list[dict[str, Any]] = read_json(path)["runs"]
        if not all(isinstance(own["facts"], dict) and isinstance(own["sizes"], dict) for own in runs):
            raise ValueError("it holds something else")
        return runs
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and the sizes are chosen anew") from error
