"""What a command asks for: which policies, tasks and lengths."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from manyheads.hosts.questions import keys_in
from manyheads.runs.sizes import Speed
from manyheads.shrink.variants import Variant

TASKS = ("passkey", "needle", "recall", "perplexity")
DENSE = "dense"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Text continued token by token, and greedy continuations.
TAIL, GREEDY = 128, 48
WINDOWS = 4
# One-token steps and repeats of a timed run.
STEPS, REPEATS = 24, 3


@dataclass(frozen=True)
class Sizes:
    """lengths: tokens of a trial. trials: for every length and depth. windows: of text. repeats: of a timed run."""

    lengths: tuple[int, ...] = (512, 1024, 2048)
    trials: int = 2
    depths: tuple[float, ...] = DEPTHS
    windows: int = WINDOWS
    repeats: int = REPEATS

    def __str__(self) -> str:
        lengths = [f"{length:,}" for length in self.lengths]
        told = " and ".join([", ".join(lengths[:-1]), lengths[-1]] if len(lengths) > 1 else lengths)
        trials = "1 trial" if self.trials == 1 else f"{self.trials} trials"
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        runs = "1 timed run" if self.repeats == 1 else f"{self.repeats} timed runs"
        return f"{trials} of {told} tokens at {len(self.depths)} depths, {windows} of text, {runs}"


# Depths of fewer trials; tokens of a question and its answer, about.
_FEW, _ASKED = (0.0, 0.5, 1.0), 24
# How much longer a token takes with a policy than with the dense cache where the cache is short: 1.0 to 1.8 measured.
_SLOWER = 1.4


def choices(whole: Sizes, *, lengths: bool, trials: bool) -> list[Sizes]:
    """From everything to the least. lengths, trials: whether these may be fewer; else they were asked for."""
    of_lengths = [whole.lengths[:count] for count in range(len(whole.lengths), 0, -1)] if lengths else [whole.lengths]
    counts = (whole.trials, 1) if trials else (whole.trials,)
    few = replace(whole, depths=_FEW, windows=min(2, whole.windows), repeats=1)
    found = [whole, *(replace(few, lengths=some, trials=count) for some in of_lengths for count in counts)]
    if lengths:
        found += [replace(found[-1], lengths=(length,)) for length in (384, 256) if length < found[-1].lengths[-1]]
    return list(dict.fromkeys([*found, replace(found[-1], windows=1)]))


@dataclass(frozen=True)
class Plan:
    """What to measure. ask: 'after' gives questions token by token, 'within' puts them into the prompt. note: how the
    sizes were chosen, if they were. chat: whether texts are turns of the model's chat template."""

    variants: list[Variant]
    tasks: tuple[str, ...] = TASKS
    sizes: Sizes = Sizes()
    ask: str = "after"
    seed: int = 0
    note: str = ""
    chat: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.sizes.lengths

    @property
    def context(self) -> int:
        """Tokens of the windows of text, and of the prompt that is timed."""
        return max(self.lengths)

    def describe(self) -> dict[str, Any]:
        sizes = {key: list(own) if isinstance(own, tuple) else own for key, own in asdict(self.sizes).items()}
        return {
            "policies": [variant.title for variant in self.variants],
            "tasks": list(self.tasks),
            **sizes,
            **{key: getattr(self, key) for key in ("ask", "seed")},
            **({"sizes": self.note} if self.note else {}),
            **({"chat": True} if self.chat else {}),
        }

    def seconds(self, speed: Speed, task: str, length: int, dense: bool) -> float:
        """What a cell takes at this speed: the tokens of its prompts, and those that come one by one. The dense cache
        is given together what follows a prompt, and goes on by itself alone one by one."""
        sizes, keys, slower = self.sizes, keys_in(length), _SLOWER
        if task == "cost":
            return (sizes.repeats + 1) * (2 * speed.read(length) + (1 + slower) * speed.decoded(STEPS))
        if task == "perplexity":
            tail = min(TAIL, length // 4)
            more = max(0, GREEDY - tail)
            if dense:
                together = max(0, tail - GREEDY)
                alone = speed.decoded(tail - together + more, 2 * sizes.windows)
                return speed.read(length - tail + together, sizes.windows) + alone
            return speed.read(length - tail, sizes.windows) + slower * speed.decoded(tail + more, 2 * sizes.windows)
        rows, asked = (sizes.trials, keys) if task == "recall" else (sizes.trials * len(sizes.depths), 1)
        if self.ask == "within":
            rows, asked = rows * asked, 1
        return speed.read(length, rows) + (0.0 if dense else slower * speed.decoded(asked * _ASKED, rows))

    def total(self, speed: Speed) -> float:
        """Seconds of all cells."""
        each = [(task, length, dense)
                for task in self.tasks
                for length in ((self.context,) if task == "perplexity" else self.lengths)
                for dense in (True, *[False] * len(self.variants))]  # fmt: skip
        each += [("cost", self.context, False)] * len(self.variants)
        return sum(self.seconds(speed, *own) for own in each)
