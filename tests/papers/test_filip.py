"""Token-max similarity against loops over tokens."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from manyheads.functional.late_interaction import token_max_similarity


def inputs():
    torch.manual_seed(0)
    image, text = torch.randn(3, 5, 6).double(), torch.randn(2, 4, 6).double()
    image_real = torch.tensor([[True] * 5, [True, True, False, True, False], [True, False, False, False, False]])
    return image, text, image_real, torch.tensor([[True] * 4, [True, True, False, False]])


def one_way(first, second):
    """Mean over the tokens of the first of their best cosine with one of the second, and which one that is."""
    best, which = [], []
    for token in first:
        values = [cosine_similarity(token, other, dim=0).item() for other in second]
        best.append(max(values))
        which.append(values.index(max(values)))
    return torch.tensor(sum(best) / len(best), dtype=torch.float64), which


def test_equation():
    image, text, image_real, text_real = inputs()
    found = token_max_similarity(image, text, image_real=image_real, text_real=text_real)
    for a in range(3):
        for t in range(2):
            patches, words = image[a][image_real[a]], text[t][text_real[t]]
            to_text, _ = one_way(patches, words)
            to_image, _ = one_way(words, patches)
            torch.testing.assert_close(found.image_to_text[a, t], to_text)
            torch.testing.assert_close(found.text_to_image[a, t], to_image)
            assert bool(text_real[t][found.best_text[a, t]].all())
            assert bool(image_real[a][found.best_image[a, t]].all())


def test_the_map_of_words_to_patches():
    image, text, _, _ = inputs()
    found = token_max_similarity(image, text)
    assert found.best_image[1, 0].tolist() == one_way(text[0], image[1])[1]
    assert found.best_text[1, 0].tolist() == one_way(image[1], text[0])[1]


def test_identities():
    image, text, _, _ = inputs()
    found = token_max_similarity(image, text)
    swapped = token_max_similarity(text, image)
    torch.testing.assert_close(found.image_to_text, swapped.text_to_image.T)
    torch.testing.assert_close(found.best_image, swapped.best_text.transpose(0, 1))
    scaled = token_max_similarity(3.0 * image, 0.1 * text)
    torch.testing.assert_close(found.image_to_text, scaled.image_to_text)
    itself = token_max_similarity(image, image.flip(1))
    torch.testing.assert_close(itself.image_to_text.diagonal(), torch.ones(3).double())


def test_padding_and_gradients():
    image, text, image_real, _ = inputs()
    image_real[2] = False
    dirty = torch.where(image_real[..., None], image, 1e3).requires_grad_()
    found = token_max_similarity(dirty, text, image_real=image_real)
    torch.testing.assert_close(found.image_to_text[2], torch.zeros(2).double())
    torch.testing.assert_close(found.text_to_image[2], torch.zeros(2).double())
    (found.image_to_text.sum() + found.text_to_image.sum()).backward()
    torch.testing.assert_close(dirty.grad[~image_real], torch.zeros_like(dirty.grad[~image_real]))
    assert bool(dirty.grad.isfinite().all())


def test_refusals():
    image, text, _, _ = inputs()
    with pytest.raises(ValueError, match=r"\(3, 5, 5\)"):
        token_max_similarity(image[..., :5], text)
    with pytest.raises(ValueError, match="True = real"):
        token_max_similarity(image, text, text_real=torch.ones(2, 3, dtype=torch.bool))
