"""Positions of the cache: what a head keeps is moved together, as if nothing had stood between.

A rotary key holds its position, so a gap in the text stays a gap for every later query. Here keys are turned on after
entries were dropped, until the i-th of L living ones of a head stands at position N - L + i, N the tokens fed: directly
before the next. Counted from 0 with the query at L, as in NVIDIA/kvpress `key_rerotation_press.py`, all distances are
the same; there a press turns once, and positions of what follows are its pipeline's affair.
"""

from __future__ import annotations

from typing import Any

import torch

from manyheads.functional.rotary import turn
from manyheads.shrink.compress import MOVED, View
from manyheads.shrink.textorder import TextOrder, one_text

# An entry's key as it came, where turning turned keys again and again would add up.
CAME = "came"


def find_turns(policy: Any, model: Any, cache: Any) -> None:
    """How each layer's keys are moved, where the policy moves them; a ValueError where nobody knows."""
    if not policy.moves:
        return
    from manyheads.hosts.families import rotations

    for layer, angles in zip(cache.layers, rotations(model), strict=True):
        # A window counts tokens of the text, and what it shows stands together anyway.
        layer.turns = None if layer.window is not None else angles


def moving_rows(layer: Any, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is kept beside new entries so that their keys can be moved."""
    if not layer.policy.moves or layer.turns is None:
        return {}
    rows = {MOVED: keys.new_zeros(keys.shape[:3], dtype=torch.float32)}
    again = layer.policy.acts(decoding=True) or layer.policy.acts(decoding=False)
    return rows | {CAME: keys} if again and torch.finfo(keys.dtype).bits < 32 else rows


def move_up(layer: Any, view: View) -> None:
    """After entries of a group were dropped."""
    if not layer.policy.moves or layer.turns is None or view.group.first is not None:
        return
    one_text(view, f"{type(layer.policy).__name__}(positions='cache')")
    text, before = TextOrder.of(view), view.note(MOVED).round().long()
    wanted = view.count[:, None, None] - text.count[..., None] + text.rank - view.positions
    wanted = wanted.masked_fill(~view.alive, 0)
    came = CAME in view.group.rows
    keys, by = (view.group.view(CAME), wanted) if came else (view.keys, wanted - before)
    at = torch.arange(view.group.length, device=by.device).expand(by.shape)
    view.put(at, keys=turn(keys, by, layer.turns.to(by.device)), moved=wanted.float())
