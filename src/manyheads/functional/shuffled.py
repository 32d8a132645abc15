"""Windows of a sequence that is shuffled near by: who meets whom when keys are drawn with a bias to near ones."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_windows(real: Tensor, keep: float, spread: float) -> tuple[Tensor, Tensor]:
    """real [b, n], True at tokens -> places [b, c, w] of the tokens of each window, in their order, and whether a slot
    is a real token, [b, c, w]. Every token is in one window; slots that are left over repeat a place and are not real.

        order by i / (spread w) + u,  u uniform in (-1, 1), drawn for each token;   cut into windows of w

    i counts real tokens, w is the share `keep` of the longest row, up to an even cut: about keep x n tokens meet each
    other, at most 2 spread w + w apart. spread 0: fixed blocks; infinite: drawn from everywhere alike.
    """
    b, n = real.shape
    longest = max(1, int(real.sum(1).max()))
    windows = max(1, int(1 / keep + 1e-6))
    w = -(-longest // windows)
    place = real.cumsum(1) - 1.0
    order = place if spread == 0 else place / (spread * w) + 2 * torch.rand(b, n, device=real.device) - 1
    # Padding fills the last windows.
    ranked = order.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
    short = -n % w
    ranked = torch.cat([ranked, ranked[:, -1:].expand(b, short)], 1)
    there = real.gather(1, ranked)
    there[:, n:] = False
    # In the order of the sequence, so that a causal rule by place is one by slot; spare slots go last.
    spare = torch.arange(n + short, device=real.device).expand(b, -1) >= n
    slots = (ranked + n * spare.long()).view(b, -1, w).argsort(2)
    return ranked.view(b, -1, w).gather(2, slots), there.view(b, -1, w).gather(2, slots)


def into_windows(tokens: Tensor, places: Tensor) -> Tensor:
    """tokens [b, n, ...] -> [b c, w, ...]."""
    b = len(tokens)
    rows = torch.arange(b, device=places.device)[:, None, None]
    return tokens[rows, places].flatten(0, 1)


def from_windows(found: Tensor, places: Tensor, n: int) -> Tensor:
    """[b c, w, ...] -> [b, n, ...]: every token's own; of slots that repeat a place the first counts."""
    b, c, w = places.shape
    flat = places.flatten(1)
    # A stable sort puts the slots of a place in line; the first of each is its token, spare ones come behind.
    at = torch.searchsorted(flat.sort(1).values, torch.arange(n, device=flat.device).expand(b, -1).contiguous())
    slot = flat.argsort(dim=1, stable=True).gather(1, at)
    return found.reshape(b, c * w, *found.shape[2:])[torch.arange(b, device=flat.device)[:, None], slot]
