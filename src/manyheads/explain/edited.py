"""A map of what counts that a person edits: the decision is made anew at every edit, and every edit is in a log.

A picture is classified by its nearest pictures. For candidate c with similarities s_c [patches] of its patches to the
picture's, and a map m of patches that count (0 or 1):
    score_c = the sum of the `best` greatest s_cp m_p
    decision = the label most frequent among the `nearest` candidates of greatest score (of equally frequent ones the
    one with the best candidate)
Source: CHM-Corr++, arXiv 2404.05238 (anguyen8/chm-corr-interactive): 7 x 7 patches, best 5, nearest 20. The map that it
begins with is attention above a threshold; editing puts the person's own 0s and 1s in its place. Neutral: the same map.
There corresponding patches come from a trained network (CHM); `patch_similarities` takes each patch's most similar one.
In the paper's study such edits did not make people more accurate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from manyheads.runs.files import write_durably


def patch_similarities(picture: Tensor, candidates: Tensor) -> Tensor:
    """picture [patches, e] and candidates [k, patches, e], features by patch -> [k, patches]: the cosine of every patch
    of the picture with the candidate's patch that is most like it. Features of zeros are like nothing."""
    if picture.dim() != 2 or candidates.dim() != 3 or picture.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"picture {list(picture.shape)}, candidates {list(candidates.shape)}: want [patches, e] and [k, patches, e]"
        )
    one, many = normalize(picture, dim=-1), normalize(candidates, dim=-1)
    return torch.einsum("pe,kqe->kpq", one, many).amax(-1)


@dataclass(frozen=True)
class Edit:
    """what: the edit in words. mask: the map after it. decision, scores: what it leads to, scores by label. flipped:
    whether the decision is another than before it."""

    what: str
    mask: list[bool]
    decision: int
    votes: dict[int, int]
    flipped: bool


@dataclass
class EditableMap:
    """similarities [candidates, patches]; labels: one per candidate; attention [patches], of which those above
    `threshold` count at first."""

    similarities: Tensor
    labels: Sequence[int]
    attention: Tensor
    threshold: float = 0.5
    best: int = 5
    nearest: int = 20
    log: list[Edit] = field(default_factory=list)

    def __post_init__(self) -> None:
        k, patches = self.similarities.shape
        if len(self.labels) != k or tuple(self.attention.shape) != (patches,) or not k or not patches:
            raise ValueError(
                f"similarities {[k, patches]}, {len(self.labels)} labels, attention {list(self.attention.shape)}: want "
                "[candidates, patches], a label per candidate and [patches]"
            )
        if self.best < 1 or self.nearest < 1:
            raise ValueError(f"best={self.best}, nearest={self.nearest}: want at least 1 of each")
        self._enter("attention above the threshold", (self.attention > self.threshold).tolist())

    @property
    def mask(self) -> Tensor:
        return torch.tensor(self.log[-1].mask)

    @property
    def decision(self) -> int:
        return self.log[-1].decision

    @property
    def flips(self) -> int:
        return sum(edit.flipped for edit in self.log)

    def scores(self, mask: Tensor | None = None) -> Tensor:
        """[candidates]; of the map as it stands, unless another is given."""
        counted = self.similarities * (self.mask if mask is None else mask).to(self.similarities)
        return counted.topk(min(self.best, counted.shape[1]), -1).values.sum(-1)

    def edit(self, mask: Any) -> Edit:
        """The whole map, patches of 0 and 1."""
        own = torch.as_tensor(mask)
        if own.shape != self.attention.shape or not bool(((own == 0) | (own == 1)).all()):
            raise ValueError(f"a map of {list(own.shape)}: give {len(self.attention)} patches of 0 and 1")
        return self._enter("a map", own.bool().tolist())

    def toggle(self, patch: int) -> Edit:
        if not 0 <= patch < len(self.attention):
            raise ValueError(f"there is no patch {patch} among {len(self.attention)}")
        own = list(self.log[-1].mask)
        own[patch] = not own[patch]
        return self._enter(f"patch {patch} {'counts' if own[patch] else 'does not count'}", own)

    def undo(self) -> Edit:
        """The map before the last edit; that it was undone stays in the log, and a second undo takes it back."""
        if len(self.log) < 2:
            raise ValueError("there is no edit to undo")
        return self._enter("undone", list(self.log[-2].mask))

    def save_log(self, path: str | Path, **facts: Any) -> None:
        """JSON: facts, such as who edited and the right label, and every edit in its order."""
        edits = [{"what": own.what, "mask": [int(one) for one in own.mask], "decision": own.decision,
                  "votes": {str(label): count for label, count in own.votes.items()}, "flipped": own.flipped}
                 for own in self.log]  # fmt: skip
        held = {**facts, "best": self.best, "nearest": self.nearest, "threshold": self.threshold, "edits": edits}
        write_durably(Path(path), (json.dumps(held, indent=1) + "\n").encode())

    def _enter(self, what: str, mask: list[bool]) -> Edit:
        scores = self.scores(torch.tensor(mask))
        order = scores.sort(descending=True, stable=True).indices[: self.nearest].tolist()
        # Counter keeps the order of first sight among equals: the best candidate's label comes first.
        votes = Counter(int(self.labels[i]) for i in order)
        decision = votes.most_common(1)[0][0]
        self.log.append(Edit(what, mask, decision, dict(votes), bool(self.log) and decision != self.decision))
        return self.log[-1]
