"""Every head is given its own tokens, and every query its caller's mask, however heads came to share a buffer."""

from __future__ import annotations

import torch
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.shrink import StreamingLLM
from manyheads.shrink.store import Store


def rows(start: int, stop: int) -> dict[str, Tensor]:
    """Keys and values that say whose they are: 100 times the head, and the slot."""
    each = torch.arange(start, stop)[None, None, :, None] + 100 * torch.arange(2)[None, :, None, None]
    return {"keys": each.double(), "values": each.double()}


def none_to_spare(length: int, heads: list[int]) -> int:
    return 0


def test_heads_that_meet_again_in_another_order_take_their_own_tokens() -> None:
    store = Store()
    store.append(rows(0, 6), 0, none_to_spare)
    store.evict([torch.tensor([[[True] * 5 + [False], [True] * 3 + [False] * 3]])], none_to_spare)
    store.evict(
        [torch.tensor([[[True, True] + [False] * (group.length - 2)]]) for group in store.groups], none_to_spare
    )
    (group,) = store.groups
    assert group.heads == [1, 0]
    store.append(rows(6, 7), 6, none_to_spare)
    for place, head in enumerate(group.heads):
        held = group.view("keys")[0, place, :, 0].sort().values
        torch.testing.assert_close(held, torch.tensor([0.0, 1.0, 6.0], dtype=torch.double) + 100 * head)


def test_room_is_made_under_a_mask_that_the_caller_made() -> None:
    model, ids = tiny("llama"), prompt(1, 24)
    causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    found = []
    for given in (False, True):
        cache = StreamingLLM(budget_tokens=8).make_cache(model)
        with torch.no_grad():
            for start, stop in ((0, 20), (20, 21), (21, 22), (22, 24)):
                mask = {"attention_mask": causal[:, :, start:stop, :stop]} if given else {}
                logits = model(ids[:, start:stop], past_key_values=cache, **mask).logits
        found.append(logits)
    torch.testing.assert_close(found[1], found[0])
