"""Rows that hold several documents, one behind another: found as transformers finds them, and kept apart.

Each document passes in a row of its own, so that every mechanism, whatever it carries along a row, sees it alone.
Shapes: b rows, n tokens, d documents, l tokens of the longest of those that pass together, e hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.beside import Beside
from manyheads.models.masks import Masks, worth_saying
from manyheads.models.stack import Stack, Trace

# More padding than this many times the tokens, and documents pass in several groups of like lengths.
WASTE = 2


class Packing(NamedTuple):
    """What a flattening collator may give beside positions, or instead: the document of each token [b, n]; in a single
    row, where documents begin and the last ends [d + 1]; the length of the longest."""

    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None

    @property
    def given(self) -> list[str]:
        return [name for name, value in self._asdict().items() if value is not None]


@dataclass(frozen=True)
class Documents:
    """starts, lengths: [d], in the tokens of all rows as one sequence. positions: [b, n] or None, as given."""

    starts: Tensor
    lengths: Tensor
    positions: Tensor | None

    def refuse_cache(self, past_key_values: object, use_cache: bool | None) -> None:
        if use_cache or past_key_values is not None:
            raise ValueError(
                f"positions begin {len(self.starts)} documents in this pass, and a cache goes on with one document per "
                "row; call with use_cache=False and no past_key_values, or give each document a row of its own"
            )

    def through(
        self, stack: Stack, x: Tensor, beside: Beside, *, output_attentions: bool, output_hidden_states: bool
    ) -> Trace:
        """The stack over each document alone, put back to where it was: x [b, n, e], beside [b, n, ...]. Weights
        between documents are zero; auxiliary losses are those of a batch of documents."""
        traces, order = [], []
        for group in self._groups():
            index, real = self._rows(group)
            positions = None if self.positions is None else self.positions.flatten()[index]
            masks = Masks(real, None, positions, {k: v.flatten(0, 1)[index] for k, v in beside.items()})
            wants = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            traces.append(stack(x.flatten(0, 1)[index], None, worth_saying(masks, index.shape[1]), **wants))
            order.append(index.masked_fill(~real, -1).flatten())
        places = torch.cat(order)
        back = places.argsort()[int((places < 0).sum()) :]

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat([part.flatten(0, 1) for part in parts])[back].view_as(x)

        hidden = [trace.hidden_states for trace in traces if trace.hidden_states is not None]
        weights = [trace.attentions for trace in traces if trace.attentions is not None]
        return Trace(
            joined([trace.last for trace in traces]),
            tuple(joined(list(layer)) for layer in zip(*hidden, strict=True)) if hidden else None,
            tuple(self._spread(list(layer), x) for layer in zip(*weights, strict=True)) if weights else None,
            None,
            self._mean([trace.aux_loss for trace in traces]),
        )

    def _groups(self) -> list[Tensor]:
        """Numbers of the documents that pass together: all, or where that is mostly padding those of like length."""
        if len(self.lengths) * int(self.lengths.max()) <= WASTE * int(self.lengths.sum()):
            return [torch.arange(len(self.lengths), device=self.lengths.device)]
        # Up to 1, 2, 4, 8, ... tokens: no group has more padding than tokens.
        size = (self.lengths.double().log2() - 1e-9).ceil().long()
        return [(size == each).nonzero()[:, 0] for each in size.unique()]

    def _rows(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens the rows of a group are, and which of them are real, [d, l]. Padding repeats a document's last
        token, so that nothing of another is ever in its row."""
        lengths = self.lengths[group, None]
        place = torch.arange(int(lengths.max()), device=lengths.device)[None]
        return self.starts[group, None] + torch.minimum(place, lengths - 1), place < lengths

    def _spread(self, parts: list[Tensor | None], x: Tensor) -> Tensor | None:
        """The weights of documents, in groups of [d, h, l, l], as [b, h, n, n]."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        (b, n, _), heads = x.shape, found[0].shape[1]
        whole = found[0].new_zeros(b, heads, n, n)
        for group, part in zip(self._groups(), found, strict=True):
            for weights, start, length in zip(
                part, *(t[group].tolist() for t in (self.starts, self.lengths)), strict=True
            ):
                row, own = start // n, slice(start % n, start % n + length)
                whole[row, :, own, own] = weights[:, :length, :length]
        return whole

    def _mean(self, losses: list[Tensor | None]) -> Tensor | None:
        """Of groups, by their tokens."""
        shares = [self.lengths[group].sum() / self.lengths.sum() for group in self._groups()]
        found = [share * loss for share, loss in zip(shares, losses, strict=True) if loss is not None]
        return torch.stack(found).sum() if found else None


def find_documents(
    position_ids: Tensor | None, attention_mask: Tensor | None, x: Tensor, packing: Packing
) -> Documents | None:
    """None where every row is one document. As in transformers, a document begins where positions do not count up by
    one, and where a mask is given none is looked for. ValueError where what says so disagrees."""
    if attention_mask is not None:
        if packing.given:
            raise ValueError(
                f"{packing.given[0]} and attention_mask were both given; packed rows have no padding: leave the mask "
                "out"
            )
        return None
    begins = _begins(packing, x)
    if position_ids is not None:
        position_ids = position_ids.expand(x.shape[0], -1)
        begins["position_ids"] = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    if not begins:
        return None
    (name, first), *others = begins.items()
    for other, second in others:
        if not torch.equal(first, second):
            row, token = (int(i) for i in (first != second).nonzero()[0])
            raise ValueError(
                f"{name} and {other} do not agree on where documents begin, first at token {token} of row {row}; give "
                "positions that restart with each document, or leave one of them out"
            )
    starts = first.flatten().nonzero()[:, 0]
    lengths = torch.cat([starts, starts.new_tensor([first.numel()])]).diff()
    for limit in ("max_length_q", "max_length_k"):
        given = getattr(packing, limit)
        if given is not None and int(given) != int(lengths.max()):
            raise ValueError(f"{limit} is {int(given)}, but the longest document given has {int(lengths.max())} tokens")
    return None if len(starts) == x.shape[0] else Documents(starts, lengths, position_ids)


def _begins(packing: Packing, x: Tensor) -> dict[str, Tensor]:
    """The tokens that begin a document, [b, n], by each name that says so."""
    found = {}
    (b, n), seq_idx = x.shape[:2], packing.seq_idx
    if seq_idx is not None:
        if seq_idx.shape != x.shape[:2]:
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; want {[b, n]}")
        found["seq_idx"] = F.pad(seq_idx.diff(dim=1) != 0, (1, 0), value=True)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        bounds = getattr(packing, name)
        if bounds is None:
            continue
        ends = [int(end) for end in bounds]
        if b != 1 or ends[:1] != [0] or ends[-1] != n or ends != sorted(set(ends)):
            raise ValueError(
                f"{name} is {ends} for {b} rows of {n} tokens; want the bounds of documents in a single row, rising "
                f"from 0 to {n}"
            )
        found[name] = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        found[name][0, ends[:-1]] = True
    return found
