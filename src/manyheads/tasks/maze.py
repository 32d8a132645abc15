"""Mazes: read the corridors, the origin and the target, and write the way; or write how A* finds it."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import generator
from manyheads.tasks.task import IGNORED, Batch, Generated, correct, register_task, regrouped, whole

PAD, MASK, MAZE, MAZE_END, ORIGIN, ORIGIN_END, TARGET, TARGET_END, PATH, PATH_END, BREAK = range(11)
WALL, CREATE, CLOSE, PLAN, CELL_0 = range(11, 16)
KINDS = ("dfs", "astar")
_STEPS = ((0, 1), (0, -1), (1, 1), (1, -1))  # axis, direction


@dataclass(frozen=True, kw_only=True)
class _Mazes(Generated):
    """size: cells on a side. kind: "dfs" or "astar"."""

    size: int = 5
    kind: str = "dfs"
    eval_examples: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "size", self.size, 3, 30)
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind={self.kind!r}; want one of {list(KINDS)}")

    @property
    def cells(self) -> int:
        return self.size * self.size

    @property
    def longest(self) -> int:
        """Of a question and its answer, in tokens."""
        if self.kind == "dfs":
            return 3 * (self.cells - 1) + 2 + 6 + 2 + self.cells
        return 2 * (self.cells // 2) + 4 + 1 + self.free + 1

    @property
    def free(self) -> int:
        """Cells without a wall at most, where walls are cells."""
        return self.cells - 3 * self.cells // 10

    @property
    def n(self) -> int:
        return self.longest

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": CELL_0 + 2 * self.cells, "max_length": self.n}

    def _one(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """The tokens of a question, and of its answer."""
        return tree(self.size, rng) if self.kind == "dfs" else walled(self.size, rng, trace=False)

    def _many(self, count: int, rng: Generator) -> list[tuple[list[int], list[int]]]:
        drawn = random.Random(int(torch.randint(1 << 62, (1,), generator=rng)))
        return [self._one(drawn) for _ in range(count)]


@register_task
@dataclass(frozen=True, kw_only=True)
class Maze(_Mazes):
    """Next-token prediction of the way through a maze, scored by whole answers: all tokens of one right, or not.

    "dfs": spanning trees by depth-first search with forks. MAZE a b ; a b ; ... MAZE_END ORIGIN o ORIGIN_END TARGET t
    TARGET_END PATH o ... t PATH_END: a token a cell, corridors and their ends in random order; the way is unique.
    "astar": 30 to 50% of the cells are walls, the shortest way has at least `size` steps. ORIGIN o TARGET t, WALL c for
    each, PATH, the way, PATH_END; with `trace` A*'s steps come first, as in Searchformer: CREATE c g h when a cell is
    opened, CLOSE c g h when it is expanded, then PLAN c along the way (g: steps so far, h: Manhattan distance left).
    Asked is what follows PATH, with the truth before it as input; as each greedy token depends only on right ones
    before it, a whole answer is right exactly where greedy decoding writes it. The trivial score is 0.
    Source: arXiv:2412.05117; `gen_dfs` of understanding-search/maze-dataset (read: the search never starts in the last
    row or column) and A* of arXiv:2402.14083 (the search loop read in a copy, the generator of walls not: its
    share and shortest length are the paper's). Ties in A* go to the cell opened first here, to chance or to the heap's
    order there; cells are one token here, x and y there.
    """

    name: ClassVar[str] = "maze"
    title: ClassVar[str] = "Mazes, token by token"
    pattern: ClassVar[str] = "causal-self"
    metric: ClassVar[str] = "whole answers right"

    trace: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trace, bool):
            raise ValueError(f"maze: trace={self.trace!r}; want true or false")
        if self.trace and self.kind == "dfs":
            raise ValueError(
                "maze: trace=true is for kind='astar'; mazes of depth-first search have no published trace"
            )

    @property
    def n(self) -> int:
        return self.longest - 1 + (9 * self.free if self.trace else 0)

    def _one(self, rng: random.Random) -> tuple[list[int], list[int]]:
        return walled(self.size, rng, trace=True) if self.trace else super()._one(rng)

    def sample(self, count: int, rng: Generator) -> Batch:
        tokens = torch.full((count, self.n + 1), PAD)
        targets = torch.full((count, self.n), IGNORED)
        for row, (question, answer) in enumerate(self._many(count, rng)):
            at, end = len(question), len(question) + len(answer)
            written = torch.tensor(question + answer)
            tokens[row, :end] = written
            targets[row, at - 1 : end - 1] = written[at:]
        return Batch({"input_ids": tokens[:, :-1].contiguous()}, targets)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[float, int]:
        self.asked(logits, targets)
        return whole_answers(logits, targets)


def whole_answers(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """How many of the rows that ask for something have all of it right, and how many ask."""
    rows = [(row, asked != IGNORED, asked) for row, asked in zip(logits, targets, strict=True)]
    found = [correct(row[where], asked[where]) for row, where, asked in rows if where.any()]
    return sum(math.nan if math.isnan(good) else float(good == count) for good, count in found), len(found)


@register_task
@dataclass(frozen=True, kw_only=True)
class MazeMasked(_Mazes):
    """MLM-U: a share of the way, drawn uniformly from 0 to 1 for each maze, is masked, and all of it asked for at once.

    The mazes of `maze`, question and way each padded to a fixed place. The encoder reads them with each token of the
    way (PATH_END and the padding after it too, so that its length is not told) masked independently with that maze's
    chance, one at least; the decoder reads nothing but MASK, a query for each place of the way, and need not be causal.
    Evaluation is one step of decoding from left to right: the way up to a random step stands, the rest is masked, asked
    is the next token alone. Source: arXiv:2412.05117 (the objective that it calls absorbing; the repository was not at
    hand, its description was). Theirs drops masked tokens from the encoder, here they are MASK, and theirs scores whole
    ways of this decoding, here its steps.
    """

    name: ClassVar[str] = "maze-masked"
    title: ClassVar[str] = "Mazes, masked at a uniform rate (MLM-U)"
    pattern: ClassVar[str] = "noncausal-cross"
    head: ClassVar[str] = "seq2seq-lm"

    def model_settings(self) -> dict[str, Any]:
        return super().model_settings() | {"decoder_causal": False}

    def sample(self, count: int, rng: Generator) -> Batch:
        question, way = self._written(count, rng)
        share, chance = torch.rand(count, 1, generator=rng), torch.rand(way.shape, generator=rng)
        masked = (chance < share) | (chance == chance.amin(1, keepdim=True))
        return _asked(question, way, hidden=masked, asked=masked)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        rng, block = generator(self.name, "eval"), 64
        sizes = (min(block, self.eval_examples - start) for start in range(0, self.eval_examples, block))
        return regrouped((self._steps(size, rng) for size in sizes), batch_size)

    def _steps(self, count: int, rng: Generator) -> Batch:
        question, way = self._written(count, rng)
        room = (way != PAD).sum(1, keepdim=True)
        step = (torch.rand(count, 1, generator=rng) * room).long()
        place = torch.arange(way.shape[1])
        return _asked(question, way, hidden=place >= step, asked=place == step)

    def _written(self, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Questions and ways, each padded."""
        most = (self.cells if self.kind == "dfs" else self.free) + 1
        question = torch.full((count, self.longest - most), PAD)
        way = torch.full((count, most), PAD)
        for row, (asks, answer) in enumerate(self._many(count, rng)):
            question[row, : len(asks)] = torch.tensor(asks)
            way[row, : len(answer)] = torch.tensor(answer)
        return question, way


def _asked(question: Tensor, way: Tensor, hidden: Tensor, asked: Tensor) -> Batch:
    seen = torch.cat([question, way.masked_fill(hidden, MASK)], 1)
    inputs = {"input_ids": seen, "decoder_input_ids": torch.full_like(way, MASK)}
    return Batch(inputs, way.masked_fill(~asked, IGNORED))


def tree(size: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """A spanning tree by depth-first search and the way between two of its cells."""
    corridors, parent = _corridors(size, rng)
    rng.shuffle(corridors)
    question = [MAZE]
    for pair in corridors:
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        question += [CELL_0 + first, CELL_0 + second, BREAK]
    origin, target = rng.sample(range(size * size), 2)
    question += [MAZE_END, ORIGIN, CELL_0 + origin, ORIGIN_END, TARGET, CELL_0 + target, TARGET_END, PATH]
    up, down = _ancestors(origin, parent), _ancestors(target, parent)
    while len(up) > 1 and len(down) > 1 and up[-2] == down[-2]:
        up.pop()
        down.pop()
    return question, [CELL_0 + cell for cell in up + down[-2::-1]] + [PATH_END]


def _ancestors(cell: int, parent: dict[int, int]) -> list[int]:
    found = [cell]
    while found[-1] in parent:
        found.append(parent[found[-1]])
    return found


def _corridors(size: int, rng: random.Random) -> tuple[list[tuple[int, int]], dict[int, int]]:
    start = rng.randrange(size - 1) * size + rng.randrange(size - 1)
    seen, stack = {start}, [start]
    corridors: list[tuple[int, int]] = []
    parent: dict[int, int] = {}
    while stack:
        here = stack[-1]
        fresh = [cell for cell in _around(here, size) if cell not in seen]
        if not fresh:
            stack.pop()
            continue
        chosen = rng.choice(fresh)
        corridors.append((here, chosen))
        parent[chosen] = here
        seen.add(chosen)
        stack.append(chosen)
    return corridors, parent


def _around(cell: int, size: int) -> list[int]:
    place = divmod(cell, size)
    found = []
    for axis, step in _STEPS:
        if 0 <= place[axis] + step < size:
            found.append(cell + step * (1 if axis else size))
    return found


def walled(size: int, rng: random.Random, trace: bool) -> tuple[list[int], list[int]]:
    """Cells with walls in some, and A*'s way between two of the others, drawn again until it is long enough."""
    cells = size * size
    while True:
        count = int(cells * rng.uniform(0.3, 0.5))
        drawn = rng.sample(range(cells), count + 2)
        origin, target, walls = drawn[0], drawn[1], drawn[2:]
        steps, way = searched(size, set(walls), origin, target)
        if len(way) > size:
            break
    question = [ORIGIN, CELL_0 + origin, TARGET, CELL_0 + target]
    for wall in sorted(walls):
        question += [WALL, CELL_0 + wall]
    if not trace:
        return [*question, PATH], [CELL_0 + cell for cell in way] + [PATH_END]
    answer = []
    for kind, cell, gone, left in steps:
        answer += [kind, CELL_0 + cell, CELL_0 + cells + gone, CELL_0 + cells + left]
    for cell in way:
        answer += [PLAN, CELL_0 + cell]
    return [*question, PATH], [*answer, PATH_END]


def searched(size: int, walls: set[int], origin: int, target: int) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """A*'s steps (CREATE or CLOSE, cell, steps so far, distance left) and the way, empty where there is none."""

    def left(cell: int) -> int:
        return abs(cell // size - target // size) + abs(cell % size - target % size)

    steps = [(CREATE, origin, 0, left(origin))]
    heap = [(left(origin), 0, origin, 0)]
    parent: dict[int, int] = {}
    gone_to = {origin: 0}
    while heap:
        _, _, cell, gone = heapq.heappop(heap)
        if gone > gone_to[cell]:
            continue
        steps.append((CLOSE, cell, gone, left(cell)))
        if cell == target:
            return steps, _ancestors(cell, parent)[::-1]
        for near in _around(cell, size):
            if near not in walls and gone + 1 < gone_to.get(near, size * size):
                gone_to[near], parent[near] = gone + 1, cell
                steps.append((CREATE, near, gone + 1, left(near)))
                heapq.heappush(heap, (gone + 1 + left(near), len(steps), near, gone + 1))
    return steps, []
