"""Two tasks whose circuits are compared: who is given something, and which colour a thing has.

Claim: heads found for one task do the same in the other (Merullo et al., arXiv 2310.08744; indirect objects from
Wang et al., arXiv 2211.00593).
    indirect object    "Then, A and B had a lot of fun at the school. B gave a ring to" -> A
    coloured objects   "I see a red cup, a blue pen, and a green hat. What color is the pen?" -> blue, after one example
The corrupted prompt has one word changed, so that positions meet: a third name gives, so that neither A nor B is asked
for (Wang's ABC draws all three anew); another of the three things is asked for. Every name, thing and colour is one
token of the model's, or is not used. Wording and words are this file's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.loading import Loaded

# fmt: off
PEOPLE = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Laura", "Anna", "David", "Robert", "Peter", "Simon",
    "Alice", "Paul", "Michael", "Jack", "Henry", "Emma", "Sarah", "Kate", "Lucy",
)
PLACES = ("school", "park", "station", "office", "hospital", "house", "store", "garden")
GIFTS = ("ring", "book", "ball", "key", "pen", "bag", "hat", "coin")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "purple", "pink", "silver")
THINGS = ("cup", "pen", "hat", "book", "ball", "bag", "box", "plate", "key", "chair", "lamp", "bowl", "ring", "coin")
# fmt: on
_LEAST = 5


@dataclass(frozen=True)
class CircuitTask:
    """clean, corrupted: ids [b, n]. right [b]: the answer's token. wrong [b, k]: the other options' tokens, and
    places [b, k]: where the prompt first tells them."""

    name: str
    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor
    places: Tensor

    def __getitem__(self, rows: slice) -> CircuitTask:
        parts = (self.clean, self.corrupted, self.right, self.wrong, self.places)
        return CircuitTask(self.name, *(part[rows] for part in parts))

    def metric(self, output: Any) -> Tensor:
        """[b]: the right answer's logit less the mean of the others', at the last token."""
        last = output.logits[:, -1]
        found: Tensor = last.gather(1, self.right[:, None])[:, 0] - last.gather(1, self.wrong).mean(1)
        return found

    def accuracy(self, output: Any) -> float:
        """How often the right answer is the likeliest of the options."""
        last = output.logits[:, -1]
        best = last.gather(1, self.wrong).amax(1)
        return float((last.gather(1, self.right[:, None])[:, 0] > best).double().mean())


Row = tuple[str, str, str, list[str]]


def indirect_object(loaded: Loaded, count: int, seed: int = 0) -> CircuitTask:
    """`count` prompts, A before B in half of them by chance. ValueError where the tokenizer cuts the names up."""
    people, places, gifts = (_whole(loaded, words) for words in (PEOPLE, PLACES, GIFTS))

    def draw(rng: random.Random) -> Row:
        given, giver, third = rng.sample(people, 3)
        first, second = rng.sample((given, giver), 2)
        start = f"Then, {first} and {second} had a lot of fun at the {rng.choice(places)}."
        end = f"gave a {rng.choice(gifts)} to"
        return f"{start} {giver} {end}", f"{start} {third} {end}", given, [giver]

    return _made("indirect-object", loaded, count, seed, draw)


def coloured_objects(loaded: Loaded, count: int, seed: int = 0) -> CircuitTask:
    """`count` prompts after one answered example. ValueError where the tokenizer cuts the words up."""
    colours, things = (_whole(loaded, words) for words in (COLOURS, THINGS))

    def draw(rng: random.Random) -> Row:
        # The example has words of its own, so that a token of the question stands once before it is asked for.
        shown, named = rng.sample(colours, 6), rng.sample(things, 6)
        one, (asked, other) = rng.randrange(3), rng.sample(range(3), 2)
        head = f"{_scene(shown[:3], named[:3], one)} {shown[one]}\n"
        texts = [f"{head}{_scene(shown[3:], named[3:], at)}" for at in (asked, other)]
        return texts[0], texts[1], shown[3 + asked], [shown[3 + at] for at in range(3) if at != asked]

    return _made("coloured-objects", loaded, count, seed, draw)


def _scene(colours: Sequence[str], things: Sequence[str], asked: int) -> str:
    told = [f"a {colour} {thing}" for colour, thing in zip(colours, things, strict=True)]
    return f"On the table I see {told[0]}, {told[1]}, and {told[2]}. The color of the {things[asked]} is"


def _whole(loaded: Loaded, words: Sequence[str]) -> list[str]:
    """Those that are one token after a space."""
    found = [word for word in words if len(loaded.encode(f" {word}")) == 1]
    if len(found) < _LEAST:
        raise ValueError(
            f"{loaded.name} cuts all but {len(found)} of {', '.join(words[:4])}, ... into pieces: the tasks need words "
            "that are one token, as most models of text have; bytes are not"
        )
    return found


def _made(name: str, loaded: Loaded, count: int, seed: int, draw: Callable[[random.Random], Row]) -> CircuitTask:
    if count < 1:
        raise ValueError(f"{name}: count={count}; want at least one prompt")
    rng = random.Random(f"{name} {seed}")
    rows = [draw(rng) for _ in range(count)]
    clean, corrupted = ([loaded.encode(row[i]) for row in rows] for i in (0, 1))  # type: ignore[arg-type]
    if len({len(ids) for ids in (*clean, *corrupted)}) > 1:
        raise ValueError(f"{name}: {loaded.name} joins words with their neighbours, so that prompts differ in length")
    right = [loaded.encode(f" {row[2]}")[0] for row in rows]
    wrong = [[loaded.encode(f" {word}")[0] for word in row[3]] for row in rows]
    places = [[ids.index(token) for token in own] for ids, own in zip(clean, wrong, strict=True)]
    return CircuitTask(name, *(torch.tensor(part) for part in (clean, corrupted, right, wrong, places)))
