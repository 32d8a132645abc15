"""Finch: what the question at the end of a prompt looks at, moved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import TextOrder, one_text, whole_number


@dataclass(kw_only=True)
class Finch(Policy):
    """Claim: a prompt is a document and a question; the question's attention tells what of the document it needs.

    window_size: tokens of the question, which ends the prompt; one number, or one for each row of the batch.
    score(t) = mean over the question's queries q of n_q softmax(q k_t), n_q the entries before q, mean over a KV head's
    query heads, [b, g, m]; the question stays. normalize=False leaves n_q out. chunk_length: every so many tokens keep
    their own share of the budget. positions="cache": what is kept moves up to the question, as if nothing had stood
    between; "text" leaves it where it was.
    Source: Finch, TACL 2024 (10.1162/tacl_a_00716), NVIDIA/kvpress `finch_press.py`, which finds the question behind a
    delimiter token and counts positions from 0: the same distances. The paper's passes chunk by chunk, each with the
    question behind it, are one pass here as in kvpress.
    """

    window_size: int | Sequence[int] | None = None
    normalize: bool = True
    chunk_length: int | None = None
    positions: str = "cache"
    when: str = "prefill"

    def __post_init__(self) -> None:
        for size in self._sizes():
            whole_number("Finch", "window_size", size, 1)
        if self.chunk_length is not None:
            whole_number("Finch", "chunk_length", self.chunk_length, 1)
        if self.when != "prefill":
            raise ValueError(f"Finch reads the question of a prompt: when={self.when!r} is not possible; use TOVA")
        super().__post_init__()

    def _sizes(self) -> list[int]:
        given: Any = self.window_size
        if given is None:
            raise ValueError("Finch: window_size says how many tokens at the end of the prompt are the question")
        several = isinstance(given, Sequence) and not isinstance(given, str)
        if several and not given:
            raise ValueError("Finch: window_size is a number of tokens, or one for each row of the batch; got none")
        return list(given) if several else [given]

    @property
    def smallest(self) -> int:
        return max(self._sizes()) + 1

    def score(self, view: View) -> Tensor:
        one_text(view, "Finch")
        sizes = self._of_rows(view)
        question = view.positions >= view.count[:, None, None] - sizes[:, None, None]
        wide = torch.promote_types(view.keys.dtype, torch.float32)
        votes, voters = torch.zeros_like(view.keys[..., 0], dtype=wide), torch.zeros_like(sizes)
        first = view.total - view.latest(sizes)[0]
        for block, asked in view.weights(last=sizes):
            rows = torch.arange(first, first + block.shape[3], device=votes.device)
            first += block.shape[3]
            before = (view.alive.unsqueeze(2) & (view.slots.unsqueeze(2) < rows[:, None])).sum(-1)
            times = before[:, :, None, :, None] if self.normalize else 1
            votes += (block * asked * times).sum(3).mean(2)
            voters = voters + asked.sum((1, 2, 3, 4))
        score = votes / voters.clamp_min(1)[:, None, None]
        score = score.masked_fill(question, torch.inf)
        return score if self.chunk_length is None else self._by_chunk(view, score, self.chunk_length)

    def _of_rows(self, view: View) -> Tensor:
        sizes, rows = self._sizes(), view.keys.shape[0]
        if len(sizes) not in (1, rows):
            raise ValueError(
                f"Finch: window_size has {len(sizes)} numbers and the batch {rows} rows (beams count); give one number "
                "for each"
            )
        return torch.tensor(sizes, device=view.keys.device).expand(rows)

    def _by_chunk(self, view: View, score: Tensor, length: int) -> Tensor:
        """Each chunk's best stand above the rest of all chunks; of a protected question all does."""
        assert view.targets is not None
        text = TextOrder.of(view)
        m = score.shape[-1]
        cut = pad(text.sort(score.masked_fill(~view.alive, -torch.inf)), (0, -m % length), value=-torch.inf)
        cut = cut.unflatten(-1, (-1, length))
        sizes = (cut > -torch.inf).sum(-1)
        share = sizes * view.targets[..., None] // text.count[..., None].clamp_min(1)
        ranks = cut.argsort(-1, descending=True).argsort(-1)
        first = text.unsort((ranks < share[..., None]).flatten(-2)[..., :m])
        top = score.masked_fill(~score.isfinite(), 0).amax() + 1
        return torch.where(first & score.isfinite(), score + top, score)
