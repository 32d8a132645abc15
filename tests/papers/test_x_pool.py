"""X-Pool against loops, and what its first weights make of it."""

import torch
import torch.nn.functional as F

from manyheads.mechanisms.cross.x_pool import XPool


def build(heads=2, *, random=True):
    torch.manual_seed(0)
    module = XPool(8, heads).double().eval()
    for parameter in module.parameters() if random else ():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def norm(layer, row):
    centred = row - row.mean()
    return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def by_loops(module, text, frames):
    """One text and one video."""
    linear = lambda layer, row: layer.weight @ row + layer.bias  # noqa: E731
    d = 8 // module.heads
    q = linear(module.q_proj, norm(module.norm_1, text))
    k = [linear(module.k_proj, norm(module.norm_1, frame)) for frame in frames]
    v = [linear(module.v_proj, norm(module.norm_1, frame)) for frame in frames]
    mixed = torch.zeros(8, dtype=text.dtype)
    for h in range(module.heads):
        part = slice(d * h, d * h + d)
        scores = [(q[part] @ key[part] / d**0.5).exp() for key in k]
        for score, value in zip(scores, v, strict=True):
            mixed[part] += score / sum(scores) * value[part]
    pooled = norm(module.norm_2, linear(module.o_proj, mixed))
    return norm(module.norm_3, pooled + linear(module.linear, pooled))


@torch.no_grad()
def test_equation():
    for heads in (1, 2):
        module, texts, frames = build(heads), torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
        real = torch.tensor([[True] * 5, [True, True, False, True, False]])
        output = module(texts, frames, mask=real).output
        for video in range(2):
            for text in range(3):
                wanted = by_loops(module, texts[video, text], frames[video][real[video]])
                torch.testing.assert_close(output[video, text], wanted)


@torch.no_grad()
def test_one_vector_per_text_and_video():
    module, texts, videos = build(), torch.randn(3, 8).double(), torch.randn(2, 5, 8).double()
    pooled = module(texts.expand(2, -1, -1), videos).output
    for t in range(3):
        torch.testing.assert_close(
            pooled[:, t : t + 1], module(texts[None, t : t + 1].expand(2, -1, -1), videos).output
        )


@torch.no_grad()
def test_at_first_it_is_attention_between_normed_vectors():
    module, texts, frames = build(1, random=False), torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    t, f = F.layer_norm(texts, (8,)), F.layer_norm(frames, (8,))
    mixed = (t @ f.mT / 8**0.5).softmax(-1) @ f
    wanted = F.layer_norm(2 * F.layer_norm(mixed, (8,)), (8,))
    torch.testing.assert_close(module(texts, frames).output, wanted)


@torch.no_grad()
def test_the_text_itself_is_not_in_the_result():
    module, frames = build(), torch.randn(1, 1, 8).double()  # one frame: nothing to choose
    first, second = (module(torch.randn(1, 2, 8).double(), frames).output for _ in range(2))
    torch.testing.assert_close(first, second)
