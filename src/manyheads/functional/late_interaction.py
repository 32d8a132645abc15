"""Similarity of two sets of tokens by each token's best match (Yao et al., FILIP, arXiv:2111.07783).

a images of n tokens, t texts of m tokens, d features. Unlike a mechanism it gives one number for a pair, and none
attends: the hard maximum is all there is between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.functional.precision import unit


class TokenMax(NamedTuple):
    """image_to_text, text_to_image [a, t]: the mean over the real tokens of the one of their largest cosine with a real
    token of the other; 0 where either has no real token. best_text [a, t, n], best_image [a, t, m]: which token that
    was, the map of words to patches."""

    image_to_text: Tensor
    text_to_image: Tensor
    best_text: Tensor
    best_image: Tensor


def token_max_similarity(
    image: Tensor, text: Tensor, *, image_real: Tensor | None = None, text_real: Tensor | None = None
) -> TokenMax:
    """image [a, n, d], text [t, m, d], *_real [a, n] and [t, m], True = real: all a t pairs, one text at a time so that
    no [a, t, n, m] is held.

    The two directions differ. FILIP's contrastive loss takes softmax(image_to_text / temperature) over texts and
    softmax(text_to_image / temperature) over images. Padded tokens neither match nor count, as in the paper.
    """
    if image.ndim != 3 or text.ndim != 3 or image.shape[2] != text.shape[2]:
        raise ValueError(
            f"token_max_similarity: image has shape {tuple(image.shape)} and text {tuple(text.shape)}; want "
            "[a, n, d] and [t, m, d]"
        )
    image, text = unit(image), unit(text)
    image_real = _real(image, image_real)
    text_real = _real(text, text_real)
    rows = [_one_text(image, image_real, text[j], text_real[j]) for j in range(text.shape[0])]
    to_text, to_image, best_text, best_image = (torch.stack(part, 1) for part in zip(*rows, strict=True))
    return TokenMax(to_text, to_image, best_text, best_image)


def _real(tokens: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if real.shape != tokens.shape[:2] or real.dtype != torch.bool:
        raise ValueError(
            f"token_max_similarity: a padding mask has shape {tuple(real.shape)} and dtype {real.dtype}; want "
            f"{list(tokens.shape[:2])} and torch.bool, True = real"
        )
    return real


def _one_text(image: Tensor, image_real: Tensor, text: Tensor, text_real: Tensor) -> tuple[Tensor, ...]:
    similarity = image @ text.T  # [a, n, m]
    both = image_real.any(1) & text_real.any()
    of_image, best_text = similarity.masked_fill(~text_real, -2.0).max(2)
    of_text, best_image = similarity.masked_fill(~image_real[..., None], -2.0).max(1)
    return _mean(of_image, image_real, both), _mean(of_text, text_real, both), best_text, best_image


def _mean(values: Tensor, real: Tensor, there: Tensor) -> Tensor:
    """Over real tokens; 0 where there is nothing to compare."""
    count = real.sum(-1).clamp(min=1).to(values.dtype)
    return (values.masked_fill(~real, 0.0).sum(-1) / count).masked_fill(~there, 0.0)
