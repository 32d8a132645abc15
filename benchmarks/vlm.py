"""What the packaged vision-language model answers about held-out glyphs: right answers by kind of question and noise,
with the picture and without it, and what it believes to be there that is not (POPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import save
from manyheads.hosts.seeing import Seeing, load_seeing
from manyheads.tasks.scenes import KINDS, Asked, Question, believed, held_out, pictures

MEASURES = ("src/manyheads/hosts/seeing.py", "src/manyheads/tasks/scenes.py")
NOISES = (0.0, 0.6)
SCENES, BATCH = 64, 64


def said(seeing: Seeing, asked: Asked, *, blind: bool = False) -> list[tuple[Question, str]]:
    """Each question with the model's greedy answer."""
    rows = [
        (picture, own) for picture, each in zip(pictures(asked.pixels), asked.questions, strict=True) for own in each
    ]
    found = []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        inputs = seeing.inputs([picture for picture, _ in some], [own.text for _, own in some])
        answers = seeing.generate(seeing.without(inputs) if blind else inputs, most=16)
        found += [(own, seeing.tokenizer.decode(ids)) for (_, own), ids in zip(some, answers, strict=True)]
    return found


def share(pairs: Sequence[tuple[Question, str]]) -> float:
    return sum(own.answer == answer for own, answer in pairs) / len(pairs)


def answers(seeing: Seeing) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for noise in NOISES:
            asked = held_out(SCENES, noise=noise, kind=kind)
            rows.append({"what": kind, "noise": noise, "right": share(said(seeing, asked))})
        rows.append({"what": kind, "noise": "no picture", "right": share(said(seeing, asked, blind=True))})
    return rows


def beliefs(seeing: Seeing) -> list[dict[str, Any]]:
    """hallucinated: share of the absent digits that are said to be there; missed: of those there that are not."""
    rows = []
    for how in ("random", "popular", "adversarial"):
        for noise in NOISES:
            asked = held_out(SCENES // 2, noise=noise, seed=2)
            questions = tuple(map(tuple, believed(asked.scenes, how)))
            pairs = said(seeing, Asked(asked.scenes, asked.pixels, questions))
            absent = [answer == "yes" for own, answer in pairs if own.answer == "no"]
            there = [answer == "no" for own, answer in pairs if own.answer == "yes"]
            rows.append(
                {"what": f"is there, {how}", "noise": noise, "right": share(pairs), "questions": len(pairs)}
                | {"hallucinated": sum(absent) / len(absent), "missed": sum(there) / len(there)}
            )
    return rows


if __name__ == "__main__":
    model = load_seeing()
    save("vlm", "cpu", [*answers(model), *beliefs(model)])
