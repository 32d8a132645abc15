"""KeyDiff: keys that point where all the others point can be spared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import one_text, wide


@dataclass(kw_only=True)
class KeyDiff(Policy):
    """Claim: tokens whose keys differ most from the average direction draw the most attention, with no query asked.

    score(t) = -cos(k_t, mean over the entries held of k / ||k||), [b, g, m].
    Source: arXiv 2504.15364, NVIDIA/kvpress `keydiff_press.py`, which ranks a whole prompt at once as here; the paper
    goes through it block by block, which chunked prefill does here. Padding and what is behind a window have no part
    in the mean.
    """

    def score(self, view: View) -> Tensor:
        one_text(view, "KeyDiff")
        keys = wide(view.keys)
        alive = view.alive[..., None].to(keys.dtype)
        # Padding may hold anything, infinity too.
        pointing = normalize(keys.masked_fill(~view.alive[..., None], 0), dim=-1)
        anchor = pointing.sum(2, keepdim=True) / alive.sum(2, keepdim=True).clamp_min(1)
        return -cosine_similarity(keys, anchor, dim=-1)
