"""gCOG: questions about a grid of coloured letters, composed of operators, with splits that ask for generalisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from manyheads.tasks.draw import distinct, generator, uniform
from manyheads.tasks.task import Batch, Generated, register_task, regrouped, whole

GRID, SHAPES, COLOURS = 10, 26, 10
CELLS = GRID * GRID
OPERATORS = ("exist", "go", "getcolor", "getshape", "sumeven", "producteven", "productodd", "sumodd", "switch")
EXIST, GO, GETCOLOUR, GETSHAPE, SUM_EVEN, PRODUCT_EVEN, PRODUCT_ODD, SUM_ODD, SWITCH = range(9)
PAD, EOS, ANY, NONE = 0, 1, 2, 3  # ANY: this selector leaves the field open; NONE: there is no such selector
OPERATOR_0, SHAPE_0, COLOUR_0 = 4, 4 + len(OPERATORS), 4 + len(OPERATORS) + SHAPES
VOCABULARY = COLOUR_0 + COLOURS
TRUE, FALSE, PLACE_0, LETTER_0, HUE_0 = 0, 1, 2, 2 + CELLS, 2 + CELLS + SHAPES
CLASSES = HUE_0 + COLOURS
NODE = 5  # tokens: operator, shape, colour, and shape and colour of a second object

_STATEMENTS = (EXIST, SUM_EVEN, PRODUCT_EVEN, SUM_ODD, PRODUCT_ODD)
_ENDS = (EXIST, GO, GETCOLOUR, GETSHAPE, SUM_EVEN, PRODUCT_EVEN, PRODUCT_ODD, SUM_ODD)
_ARITHMETIC = (SUM_EVEN, PRODUCT_EVEN, PRODUCT_ODD, SUM_ODD)
# What is only ever asked together in training, and crosswise in the evaluation.
_GROUPS = ((EXIST, SUM_EVEN, PRODUCT_EVEN, GETSHAPE), (SUM_ODD, PRODUCT_ODD, GO, GETCOLOUR))
_TREE_STATEMENTS = ((EXIST, SUM_EVEN, PRODUCT_EVEN), (SUM_ODD, PRODUCT_ODD))
_TREE_ENDS = ((SUM_EVEN, PRODUCT_EVEN, GETCOLOUR, GETSHAPE), (EXIST, SUM_ODD, PRODUCT_ODD, GO))
SPLITS = ("iid", "distractors", "systematic", "systematic-tree", "productive")


class _Tree(NamedTuple):
    """Operators [b, nodes] in level order, and the one or two objects that each names: shape, colour [b, nodes, 2] and
    which of them is there. Statements and ends only: where a switch goes follows from the depth."""

    operator: Tensor
    shape: Tensor
    colour: Tensor
    named: Tensor


@register_task
@dataclass(frozen=True, kw_only=True)
class GridCognition(Generated):
    """An instruction and a 10 x 10 grid of coloured letters are read, one of 138 classes is the answer.

    The instruction is an operator (exist, go, getcolor, getshape, sum or product of the coordinates even or odd), or a
    tree: if a statement holds, then this, else that. Input: five tokens a node in level order, EOS, then colour and
    shape of the 100 cells (0 where empty); classes: true, false, 100 places, 26 letters, 10 colours. split says how the
    evaluation differs from training, as in the authors' notebooks: "iid" not at all (a question without distractors may
    come again); "distractors" 0 to 5 of them, then exactly `distractors`; "systematic" operators with objects that they
    were not asked of; "systematic-tree" statements (depth 3) above ends that they never stood above; "productive" depth
    3, then `depth`. The best constant answer is right in about 0.31.
    Source: arXiv:2401.15030, IBM/gcog `gcog/task/` (read at 80de678): same operators, distributions, classes (class
    2 + r is the place (r % 10, r // 10), cell r of the input is (r // 10, r % 10)) and "the first object in the order
    of places" where several fit. Different: an open field has a token of its own (theirs shares 1 with the first letter
    and colour), the time, always "current", is left out, colour tokens are those of the grid, places are drawn without
    collisions, and two get-operators of a tree that name the same thing are kept (theirs renames one of them).
    In theirs, too, the two halves of "systematic" share the objects of an early colour and a late letter.
    """

    name: ClassVar[str] = "gcog"
    title: ClassVar[str] = "Grid cognition (gCOG)"
    pattern: ClassVar[str] = "noncausal-self"
    head: ClassVar[str] = "sequence-classification"

    split: str = "iid"
    distractors: int = 20
    depth: int = 5
    features: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise ValueError(f"gcog: split={self.split!r}; want one of {list(SPLITS)}")
        whole(self, "distractors", self.distractors, 0, 40)
        whole(self, "features", self.features, 2, COLOURS, "so many first letters and colours are asked for")
        whole(self, "depth", self.depth, 3, 7)
        if self.depth % 2 == 0:
            raise ValueError(f"gcog: depth={self.depth}; want 3, 5 or 7: a tree ends below a switch, at an odd depth")

    @property
    def n(self) -> int:
        return NODE * max(_size(depth) for depth in self.depths) + 1 + 2 * CELLS

    @property
    def depths(self) -> tuple[int, int]:
        """Of the trees in training and in the evaluation."""
        return {"systematic-tree": (3, 3), "productive": (3, self.depth)}.get(self.split, (1, 1))

    def model_settings(self) -> dict[str, Any]:
        return {"vocab_size": VOCABULARY, "max_length": self.n, "num_labels": CLASSES}

    def sample(self, count: int, rng: Generator) -> Batch:
        return self._draw(count, rng, evaluates=False)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        whole(self, "batch_size", batch_size, 1, 65_536)
        rng, block = generator(self.name, "eval"), 64
        sizes = (min(block, self.eval_examples - start) for start in range(0, self.eval_examples, block))
        return regrouped((self._draw(size, rng, evaluates=True) for size in sizes), batch_size)

    def _draw(self, count: int, rng: Generator, evaluates: bool) -> Batch:
        depth = self.depths[evaluates]
        tree = self._tree(count, depth, rng, crossed=evaluates)
        exact = evaluates and self.split == "distractors"
        most = self.distractors if exact else 5
        many = torch.full((count, 1), most) if exact else uniform(count, 1, 0, most + 1, rng)
        shape, colour = _scene(tree, many, most, rng)
        words = _instruction(tree, depth, self.n - 2 * CELLS)
        seen = torch.stack([_token(colour, COLOUR_0), _token(shape, SHAPE_0)], 2).flatten(1)
        return Batch({"input_ids": torch.cat([words, seen], 1)}, answers(tree, depth, shape, colour))

    def _tree(self, count: int, depth: int, rng: Generator, crossed: bool) -> _Tree:
        nodes = 2 ** ((depth + 1) // 2) - 1
        inner = nodes // 2
        group = uniform(count, 1, 0, 2, rng)
        if self.split == "systematic-tree":
            statements = _choose(_TREE_STATEMENTS, group.expand(-1, inner), rng)
            ends = _choose(_TREE_ENDS, (group ^ int(crossed)).expand(-1, nodes - inner), rng)
        else:
            statements = _choose((_STATEMENTS,), torch.zeros(count, inner, dtype=torch.long), rng)
            kinds = _GROUPS if self.split == "systematic" else (_ENDS, _ENDS)
            ends = _choose(kinds, group.expand(-1, nodes - inner), rng)
        operator = torch.cat([statements, ends], 1)
        shape, colour = (uniform(count, 2 * nodes, 0, self.features, rng).view(count, nodes, 2) for _ in range(2))
        if self.split == "systematic":
            half = round(self.features / 2)
            early = (group ^ int(crossed)) == 0  # any letter in an early colour; otherwise a late letter in any colour
            colour[:, 0] = torch.where(early, uniform(count, 2, 0, half, rng), colour[:, 0])
            shape[:, 0] = torch.where(early, shape[:, 0], uniform(count, 2, half, self.features, rng))
        colour[..., 1] = uniform(count, nodes, 0, COLOURS, rng)
        shape[..., 1] = uniform(count, nodes, 0, SHAPES, rng)
        two = torch.isin(operator, torch.tensor(_ARITHMETIC)) & (uniform(count, nodes, 0, 2, rng) == 1) & (depth > 1)
        return _Tree(operator, shape, colour, torch.stack([torch.ones_like(two), two], 2))


def _size(depth: int) -> int:
    """Nodes of a tree, switches among them."""
    levels = (depth + 1) // 2
    return (1 << levels) - 1 + (1 << (levels - 1)) - 1


def _choose(groups: tuple[tuple[int, ...], ...], which: Tensor, rng: Generator) -> Tensor:
    """An operator of groups[which], all of a group equally likely."""
    sizes = torch.tensor([len(group) for group in groups])
    table = torch.tensor([[group[i % len(group)] for i in range(8)] for group in groups])
    place = (torch.rand(which.shape, generator=rng) * sizes[which]).long()
    return table[which, place]


def _token(feature: Tensor, first: int) -> Tensor:
    return torch.where(feature < 0, PAD, feature + first)


def _instruction(tree: _Tree, depth: int, room: int) -> Tensor:
    """[b, room]: the nodes in level order with the switches between the levels, EOS, padding."""
    count, nodes = tree.operator.shape
    shape = torch.where(tree.operator[..., None] == GETSHAPE, ANY, tree.shape + SHAPE_0)
    colour = torch.where(tree.operator[..., None] == GETCOLOUR, ANY, tree.colour + COLOUR_0)
    objects = torch.where(tree.named[..., None], torch.stack([shape, colour], 3), NONE)
    asked = torch.cat([tree.operator[..., None] + OPERATOR_0, objects.flatten(2)], 2)
    switch = torch.tensor([SWITCH + OPERATOR_0, NONE, NONE, NONE, NONE])
    levels, start = [], 0
    while start < nodes:
        width = start + 1
        levels.append(asked[:, start : start + width])
        if 2 * start + 1 < nodes:
            levels.append(switch.expand(count, width, NODE))
        start += width
    words = torch.cat(levels, 1).flatten(1)
    end = torch.full((count, 1), EOS)
    padding = torch.full((count, room - words.shape[1] - 1), PAD)
    return torch.cat([words, end, padding], 1)


def _scene(tree: _Tree, many: Tensor, most: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Shape and colour [b, 100] of each cell, -1 where empty: distractors first, then what the tree asks for over them.

    No distractor has the letter whose colour is asked for, or the colour whose letter is; one that is the very object
    that is placed goes, as does one in its place. Half of the objects whose existence is asked for are not placed.
    """
    count, nodes = tree.operator.shape
    shape = torch.full((count, CELLS), -1)
    colour = shape.clone()
    if most:
        there = torch.arange(most) < many
        cell = distinct(count, most, 0, CELLS, rng)
        shape.scatter_(1, cell, torch.where(there, _apart(tree, tree.shape, GETCOLOUR, SHAPES, most, rng), -1))
        colour.scatter_(1, cell, torch.where(there, _apart(tree, tree.colour, GETSHAPE, COLOURS, most, rng), -1))
    placed = torch.zeros(count, CELLS, dtype=torch.bool)
    skipped = (tree.operator == EXIST) & (uniform(count, nodes, 0, 2, rng) == 1)
    cells = distinct(count, 2 * nodes, 0, CELLS, rng).view(count, nodes, 2)
    for node in range(nodes):
        for which in range(2):
            letter, hue = tree.shape[:, node, which, None], tree.colour[:, node, which, None]
            wanted = (tree.named[:, node, which] & ~skipped[:, node])[:, None]
            same = (shape == letter) & (colour == hue)
            gone = wanted & same & ~placed
            new = wanted & ~(same & placed).any(1, keepdim=True)
            here = new & (torch.arange(CELLS) == cells[:, node, which, None])
            shape = torch.where(here, letter, shape.masked_fill(gone, -1))
            colour = torch.where(here, hue, colour.masked_fill(gone, -1))
            placed |= here
    return shape, colour


def _apart(tree: _Tree, feature: Tensor, operator: int, kinds: int, many: int, rng: Generator) -> Tensor:
    """[b, many] of the kinds that no node with this operator names."""
    free = torch.ones(len(feature), kinds)
    for node in range(feature.shape[1]):
        named = (tree.operator[:, node, None] == operator) & (torch.arange(kinds) == feature[:, node, :1])
        free.masked_fill_(named, 0.0)
    return torch.multinomial(free, many, replacement=True, generator=rng)


def answers(tree: _Tree, depth: int, shape: Tensor, colour: Tensor) -> Tensor:
    """[b]: the class of the answer that the tree gives on the scene."""
    open_shape, open_colour = (tree.operator[..., None, None] == get for get in (GETSHAPE, GETCOLOUR))
    letter = open_shape | (shape[:, None, None] == tree.shape[..., None])
    hue = open_colour | (colour[:, None, None] == tree.colour[..., None])
    fits = letter & hue & (shape >= 0)[:, None, None]
    cell = fits.int().argmax(-1)
    down, across = cell // GRID, cell % GRID
    total = torch.where(tree.named, down + across, 0).sum(-1)
    product = torch.where(tree.named, down * across, 1).prod(-1)
    holds = torch.stack([fits[:, :, 0].any(-1), total % 2 == 0, product % 2 == 0, product % 2 == 1, total % 2 == 1])
    first = cell[..., 0]
    found = torch.stack([PLACE_0 + across[..., 0] * GRID + down[..., 0], HUE_0 + colour.gather(1, first)])
    of_node = torch.cat([(~holds).long()[:1], found, (LETTER_0 + shape.gather(1, first))[None], (~holds).long()[1:]])
    result = of_node.gather(0, tree.operator[None])[0]
    at = torch.zeros(len(result), 1, dtype=torch.long)
    for _ in range((depth - 1) // 2):
        at = 2 * at + 1 + result.gather(1, at)
    return result.gather(1, at)[:, 0]
