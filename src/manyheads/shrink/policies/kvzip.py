"""KVzip: what a model needs to say its context again is what it needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from manyheads.cache_names import with_cache
from manyheads.hosts.attend import probabilities, query_blocks
from manyheads.shrink.compress import View, _views
from manyheads.shrink.textorder import whole_number
from manyheads.shrink.together import Fed, Together

# Tokens of the chunk before that a request to repeat names; the official code's number.
_CARRIED = 8


class Chunk(NamedTuple):
    """Slots [b, L] of a chunk's tokens and of the sinks before it [b, s]; real: which of the chunk's there are."""

    slots: Tensor
    real: Tensor
    sinks: Tensor


@dataclass(kw_only=True)
class KVzip(Together):
    """Claim: entries that reconstruct the context serve any question about it.

    Once the context is there the model is given each chunk of it once more, behind a request to repeat it,
    and score(t) = max over those queries, and a KV head's query heads, of their attention to t among the sinks, the
    chunk and what was just fed, [b, H, m]. The best of all layers and heads together stay (per_layer=True: of each
    layer), sinks always; decoded tokens all do. request, again, suffix: token ids of "Repeat the previous context
    exactly", of "... starting with" for later chunks, and of what ends a turn: `KVzip.phrases(tokenizer)`; with none
    the context alone is fed again. Costs two to three prompts' time.
    Source: arXiv 2505.23416, snu-mllab/KVzip, NVIDIA/kvpress `kvzip_press.py`. There a chat template's beginning is
    left out of the repetition; here all is repeated. Rows of a batch choose for themselves, in buffers of the longest.
    """

    request: Sequence[int] = ()
    again: Sequence[int] = ()
    suffix: Sequence[int] = ()
    chunk_size: int = 2048
    does: ClassVar[str] = "repeats a context"
    why: ClassVar[str] = "feeds the context twice"

    def __post_init__(self) -> None:
        whole_number("KVzip", "chunk_size", self.chunk_size, 1)
        for name in ("request", "again", "suffix"):
            for token in getattr(self, name):
                whole_number("KVzip", f"a token of {name}", token, 0)
        super().__post_init__()

    @staticmethod
    def phrases(tokenizer: Any) -> dict[str, list[int]]:
        """The official requests as arguments, in the tokens of a transformers tokenizer."""
        suffix = "\n"
        if getattr(tokenizer, "chat_template", None) is not None:
            mark = "\n####"
            turn = [{"role": "user", "content": f"context{mark}"}]
            suffix = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False).split(mark)[1]
        texts = {
            "request": "\n\nRepeat the previous context exactly.",
            "again": "\n\nRepeat the part of the previous context exactly, starting with",
            "suffix": suffix,
        }
        return {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}

    def score_all(self, module: Any, cache: Any, fed: Fed, alive: Tensor) -> list[Tensor]:
        cache.shared["repeating"], guesses, cache.guesses = True, cache.guesses, None
        cache.activate_past_recording()
        try:
            return self._repeat(module, cache, fed.embedded(module), alive)
        finally:
            cache.guesses = guesses
            cache.shared.pop("repeating")
            for layer in cache.layers:
                layer.record_past = False

    def _repeat(self, module: Any, cache: Any, embedded: Tensor, alive: Tensor) -> list[Tensor]:
        """Scores [b, H, m] of every layer."""
        b, m = embedded.shape[:2]
        # Real tokens first, as they stand in the text.
        order, count = (~alive).byte().argsort(dim=1, stable=True), alive.sum(1)
        scores = [embedded.new_zeros((b, len(layer.store.lengths()), m), dtype=torch.float32) for layer in cache.layers]
        for start in range(0, int(count.max()), self.chunk_size):
            slots = order[:, start : start + self.chunk_size]
            inside = torch.arange(start, start + slots.shape[1], device=count.device) < count[:, None]
            chunk = Chunk(slots, inside, order[:, : min(self.sink_size, start)])
            fed, valid = self._request(module, embedded, order, start, inside)
            mask = None if bool(valid.all()) and bool(alive.all()) else torch.cat([alive, valid], 1).long()
            positions = count[:, None] + (valid.long().cumsum(1) - 1).clamp_min(0)
            given = {"inputs_embeds": fed, "attention_mask": mask, "position_ids": positions}
            module(**with_cache(given, cache), use_cache=True)
            for layer, score in zip(cache.layers, scores, strict=True):
                found = _looked_at(_views(layer, layer.recorded)[0], chunk, valid)
                at = slots[:, None].expand_as(found)
                score.scatter_reduce_(2, at, torch.where(inside[:, None], found.float(), 0), "amax")
            cache.crop(-fed.shape[1])
        return scores

    def _request(
        self, module: Any, embedded: Tensor, order: Tensor, start: int, inside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is fed for one chunk, [b, n, e], and which of it is real, [b, n]."""
        b, n = inside.shape
        embed = module.get_input_embeddings()

        def words(ids: Sequence[int]) -> Tensor:
            return embed(torch.tensor(list(ids), dtype=torch.long, device=embedded.device)).expand(b, -1, -1)

        carried = order[:, max(0, start - _CARRIED) : start] if start and self.again else order[:, :0]
        parts = [words(self.again if start else self.request), _rows(embedded, carried), words(self.suffix)]
        text = torch.cat([*parts, _rows(embedded, order[:, start : start + n])], 1)
        before = text.shape[1] - n
        # A row that ended before this chunk is asked nothing.
        asked = inside.any(1, keepdim=True).expand(-1, before)
        return text, torch.cat([asked, inside], 1)


def _rows(embedded: Tensor, at: Tensor) -> Tensor:
    return embedded.gather(1, at[..., None].expand(-1, -1, embedded.shape[-1]))


def _looked_at(view: View, chunk: Chunk, valid: Tensor) -> Tensor:
    """[b, H, L]: the most that a query of the latest pass gives to each token of the chunk."""
    done, n = view.passes[-1], valid.shape[1]
    context = torch.cat([chunk.sinks, chunk.slots], 1)[:, None, :, None]
    held = view.keys.shape[2] - n
    keys = view.keys[:, :, :held].gather(2, context.expand(-1, view.keys.shape[1], -1, view.keys.shape[3]))
    keys = torch.cat([keys, view.keys[:, :, held:]], 2)
    sinks = chunk.sinks.shape[1]
    known = torch.cat([torch.ones_like(chunk.sinks, dtype=torch.bool), chunk.real], 1)
    most = torch.zeros(*keys.shape[:2], chunk.slots.shape[1], device=keys.device)
    for rows in query_blocks(done.queries, keys.shape[2]):
        at = torch.arange(n, device=keys.device)
        own = (at <= at[rows, None]) & valid[:, None]
        seen = torch.cat([known[:, None].expand(-1, own.shape[1], -1), own], 2)[:, None]
        block = probabilities(done.queries[:, :, :, rows], keys, done.scoring, seen)
        block = block[..., sinks : sinks + chunk.slots.shape[1]] * valid[:, None, None, rows, None]
        most = torch.maximum(most.to(block), block.amax((2, 3)))
    return most
