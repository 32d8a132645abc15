"""What a chat template puts around the words of a conversation, as tokens that no policy may drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.turns import around


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Claim: a model that loses the tokens of its chat template answers as if there were no turns; keep them.

    special: token ids that are protected wherever they stand; pieces: sequences of ids, such as a turn's beginning;
    system: the sequence after which a system message's words stand, and that which ends them. `of(tokenizer)` finds all
    three: it renders conversations, and what is not their words is the template, a default system message included.
    SnapKV(budget_tokens=512, protect=ChatTemplate.of(tokenizer)) drops none of them; a budget that is too small for
    them is refused when it is met. Single tokens that are decoded are protected where they are special.
    """

    special: frozenset[int] = frozenset()
    pieces: tuple[tuple[int, ...], ...] = ()
    system: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @classmethod
    def of(cls, tokenizer: Any, *, system: bool = True) -> ChatTemplate:
        """system=False leaves the words of a system message to the policy."""
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"{type(tokenizer).__name__} has no chat_template, which says what is to be protected")
        first = around(tokenizer, ["user", "assistant", "user"])
        try:
            rest = around(tokenizer, ["system", "user"])
        except Exception:  # what a template says of a role that it does not take is its own affair
            rest = []
        found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (*first, *rest)]
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        told = None
        if system and rest:
            before, after = found[len(first) : len(first) + 2]
            # Up to the first special token: what follows it is the next turn's.
            end = next((i for i, own in enumerate(after) if own in special), len(after) - 1)
            told = (before, after[: end + 1]) if before and after else None
        # A line break alone, as some templates have it between turns, stands in any text.
        telling = {own for own in found if len(own) > 2 or special & set(own)}
        pieces = tuple(sorted(telling, key=lambda own: (-len(own), own)))
        return cls(special=frozenset(special), pieces=pieces, system=told)

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"special": sorted(self.special), "pieces": self.pieces, "system": self.system}

    def single(self, ids: Tensor) -> Tensor:
        """Which ids [b, n] are special, [b, n] bool."""
        return torch.isin(ids, torch.tensor(sorted(self.special), dtype=ids.dtype, device=ids.device))

    def places(self, ids: Tensor) -> Tensor:
        """Which tokens of whole texts, ids [b, n], are protected, [b, n] bool."""
        found = self.single(ids)
        for piece in self.pieces:
            here = _starts(ids, piece)
            for place in range(len(piece) if here.any() else 0):
                found[:, place : place + here.shape[1]] |= here
        if self.system is not None:
            before, after = self.system
            ends = _starts(ids, after)
            for row, at in _starts(ids, before).nonzero().tolist():
                at += len(before)
                later = ends[row, at:].nonzero()
                stop = at + int(later[0]) + len(after) if len(later) else ids.shape[1]
                found[row, at:stop] = True
        return found


def _starts(ids: Tensor, piece: tuple[int, ...]) -> Tensor:
    """[b, n - L + 1]: where a sequence of L ids begins."""
    if ids.shape[1] < len(piece):
        return torch.zeros((ids.shape[0], 0), dtype=torch.bool, device=ids.device)
    wanted = torch.tensor(piece, dtype=ids.dtype, device=ids.device)
    return (ids.unfold(1, len(piece), 1) == wanted).all(-1)
