"""What a command asks for: which policies, tasks and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
class Plan:
    """What to measure. ask: 'after' gives questions token by token, 'within' puts them into the prompt."""

    variants: list[Variant]
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (512, 1024, 2048)
    trials: int = 2
    ask: str = "after"
    seed: int = 0

    @property
    def context(self) -> int:
        """Tokens of the windows of text, and of the prompt that is timed."""
        return max(self.lengths)

    def describe(self) -> dict[str, Any]:
        return {
            "policies": [variant.title for variant in self.variants],
            **{key: list(getattr(self, key)) for key in ("tasks", "lengths")},
            **{key: getattr(self, key) for key in ("trials", "ask", "seed")},
            "depths": list(DEPTHS),
        }
