"""InstaManip: what is learnt from examples goes through a few tokens, and only these are applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from manyheads.hosts.taps import AttentionCall
from manyheads.hosts.thin import check_whole
from manyheads.steer.common import changed, check_share, normalised, positions
from manyheads.steer.method import Prompt, steering


@contextmanager
def group_attention(
    model: nn.Module,
    exemplars: Sequence[int] | slice,
    manipulation: Sequence[int] | slice,
    hidden: float = 1.0,
    *,
    stack: str | None = None,
) -> Iterator[None]:
    """Claim: examples distract while what they teach is applied; it is learnt in one group of tokens and applied in
    another.

    Learning: exemplars (images and words) and the manipulation tokens after them, causal as ever. Applying:
    manipulation tokens, and whatever comes after them. A query behind the last manipulation token does not see the
    exemplars: A'_ij = A_ij (1 - hidden) / Z_i for j in exemplars, Z_i the new row sum; hidden 1 is the paper's mask,
    0 changes nothing. Spans are places in what was fed, the manipulation tokens after the exemplars. In a decoder the
    mask holds in all layers, while decoding too. stack: whose layers; the one that reads text.
    Source: arXiv 2412.01027, BolinLai/InstaManip (scope_mask), where the manipulation tokens are learnt embeddings of a
    tuned model; here they are words, of a model that was not tuned for it.
    """
    check_share("group_attention: hidden", hidden)

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        check_whole(call.site.module, "group_attention")
        n, m = call.query.shape[2], call.key.shape[2]
        shown, kept = positions(exemplars, m), positions(manipulation, m)
        if not hidden or not shown or not kept:
            return None
        if min(kept) <= max(shown):
            raise ValueError(
                f"group_attention: manipulation tokens stand after the exemplars; got {kept[0]} and {shown[-1]}"
            )
        applies = (torch.arange(m - n, m, device=call.query.device) > max(kept))[:, None]

        def edit(weights: Tensor, rows: slice) -> Tensor:
            less = weights.clone()
            less[..., shown] *= 1 - hidden
            return torch.where(applies[rows], normalised(less, weights, call), weights)

        return call.mix(edit, own)

    with changed(model, None, change, stack, of_text=True):
        yield


@steering(
    "group_attention",
    title="examples are read by a few tokens, and only these by the answer (InstaManip)",
    source="arXiv 2412.01027",
    kinds=("language", "vision-language"),
    neutral={"hidden": 0.0},
    strength="hidden",
    reach=(0.0, 1.0),
)
def _open(
    model: nn.Module, prompt: Prompt, *, exemplars: str = "text1", manipulation: str = "text2", hidden: float = 1.0
) -> AbstractContextManager[None]:
    return group_attention(model, prompt.places(exemplars), prompt.places(manipulation), hidden)
