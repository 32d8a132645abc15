"""Reading a part of the cache against reading all of it: one decode step of a Llama-shaped stack at a context of 32k.

32 query heads on 8, d 128, batch 1, 8 layers, float32; both sides hold the same ragged cache of random keys and values.
Before anything is timed, both ways of reading must give ordinary attention where they read everything. The chunks of
LongHeads are made of random queries. `read_share`: entries read of those held, over all layers.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from shrink import HEAD_DIM, HEADS, KV_HEADS, stack

from common import device_argument, pair, save
from manyheads.hosts.attend import Scoring
from manyheads.hosts.visibility import Visibility
from manyheads.shrink import Full, LongHeads, Policy, TidalDecode
from manyheads.shrink.policies.longheads import represent
from manyheads.shrink.policies.tidal import attend_to

MEASURES = (
    "src/manyheads/shrink",
    "src/manyheads/hosts",
)

LAYERS, CONTEXT = 8, 32768


class Decoder:
    """Single tokens, one after the other, on a cache that is filled with random keys, values and queries."""

    def __init__(self, policy: Policy, length: int, device: str) -> None:
        self.model = stack(device, LAYERS)
        self.cache = policy.make_cache(self.model)
        self.token = torch.tensor([[7]], device=device)
        generator = torch.Generator(device).manual_seed(1)
        for layer in self.cache.layers:
            keys, values = (
                torch.randn(1, KV_HEADS, length, HEAD_DIM, device=device, generator=generator) for _ in range(2)
            )
            layer.update(keys, values)
            layer.store.own(layer.spare)
            self._chunks(layer, generator, device)

    @torch.no_grad()
    def _chunks(self, layer: Any, generator: torch.Generator, device: str) -> None:
        """What a pass of the prompt would have left in the layer's memory, from random queries in blocks."""
        if not isinstance(self.cache.policy, LongHeads):
            return
        first, scoring = torch.zeros(1, dtype=torch.long, device=device), Scoring(HEAD_DIM**-0.5)
        for start in range(0, layer.seen, 1024):
            shape = (1, KV_HEADS, HEADS // KV_HEADS, min(1024, layer.seen - start), HEAD_DIM)
            queries = torch.randn(shape, device=device, generator=generator)
            size = self.cache.policy.chunk_size
            represent(layer, queries, layer.store.groups[0], scoring, first, start, size)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        logits: torch.Tensor = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        return logits

    @property
    def read_share(self) -> float:
        return sum(map(sum, self.cache.entries_read())) / sum(map(sum, self.cache.lengths()))


@torch.no_grad()
def check(device: str, length: int = 2048) -> None:
    """Reading everything, entry by entry or chunk by chunk, is ordinary attention."""
    policy = LongHeads(budget_tokens=length)
    layer = Decoder(policy, length, device).cache.layers[0]
    group, scoring, seen = layer.store.groups[0], Scoring(HEAD_DIM**-0.5), Visibility(None, None, length - 1)
    queries = torch.randn(1, KV_HEADS, HEADS // KV_HEADS, 1, HEAD_DIM, device=device)
    wanted = layer.ordinary(queries, scoring, seen)
    last, first = torch.tensor([[length - 1]], device=device), torch.zeros(1, dtype=torch.long, device=device)
    given = policy.selective(layer, queries, group, scoring, last, first)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
    slots = torch.randperm(length, device=device).expand(1, HEADS, 1, length)
    torch.testing.assert_close(attend_to(queries, group, slots, scoring, seen), wanted, atol=1e-5, rtol=1e-4)


def main() -> None:
    device = device_argument()
    check(device)
    rows = []
    for policy in (
        TidalDecode(top_k=256),
        TidalDecode(top_k=1024),
        TidalDecode(top_k=1024, correction_layer=5),
        LongHeads(budget_tokens=2048),
        LongHeads(budget_tokens=4096),
    ):
        ours, theirs = Decoder(policy, CONTEXT, device), Decoder(Full(), CONTEXT, device)
        found = pair(ours, theirs, rounds=9, device=device)
        share, memory = ours.read_share, ours.cache.nbytes / theirs.cache.nbytes
        name = f"{type(policy).__name__} {policy.budget_tokens}"
        if getattr(policy, "correction_layer", None) is not None:
            name += ", corrected"
        rows.append({"policy": name, "context": CONTEXT, **found, "read_share": share, "bytes_share": memory})
        del ours, theirs
        gc.collect()
    save("shrink_reading", device, rows)


if __name__ == "__main__":
    main()
