"""AKI's mask against loops over a written-out sequence."""

import pytest
import torch

from manyheads.mechanisms.cross.modality_mutual import ModalityMutual
from manyheads.mechanisms.plain.softmax import Softmax

# begin, two image tokens, begin of the question, two question tokens, two answer tokens
KINDS = [2, 0, 0, 2, 1, 1, 2, 2]
SEES = [
    "x.......",
    "xx..xx..",
    "xxx.xx..",
    "xxxx....",
    "xxxxx...",
    "xxxxxx..",
    "xxxxxxx.",
    "xxxxxxxx",
]


def build(**config):
    torch.manual_seed(0)
    return ModalityMutual(15, 3, **config).double().eval()


def marked(kinds=KINDS, batch=2):
    torch.manual_seed(1)
    return torch.cat([torch.randn(batch, len(kinds), 12), torch.eye(3)[kinds].expand(batch, -1, -1)], -1).double()


def plain_of(module, **config):
    plain = Softmax(12, 3, **config).double()
    plain.load_state_dict(module.state_dict())
    return plain


@torch.no_grad()
def test_who_sees_whom():
    weights = build()(marked(), need_weights=True).weights
    seen = torch.tensor([[mark == "x" for mark in row] for row in SEES])
    assert torch.equal(weights[1, 2] > 0, seen)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 8).double())


@torch.no_grad()
def test_by_loops():
    module, x = build(), marked()
    content, mixed = x[1, :, :12], torch.zeros(8, 12).double()
    for i, row in enumerate(SEES):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q, seen = module.q_proj.weight[part] @ content[i], [j for j, mark in enumerate(row) if mark == "x"]
            scores = [(q @ (module.k_proj.weight[part] @ content[j]) / 2).exp() for j in seen]
            for j, score in zip(seen, scores, strict=True):
                mixed[i, part] += score / sum(scores) * (module.v_proj.weight[part] @ content[j])
    found = module(x).output[1]
    torch.testing.assert_close(found[:, :12], module.o_proj(mixed))
    torch.testing.assert_close(found[:, 12:], torch.zeros(8, 3).double())


@pytest.mark.parametrize("kinds", [[0] * 8, [1] * 8, [2] * 8, [1, 1, 1, 0, 0, 2, 2, 2]])
@torch.no_grad()
def test_without_a_question_after_an_image_it_is_causal_attention(kinds):
    module, x = build(), marked(kinds)
    torch.testing.assert_close(module(x).output[..., :12], plain_of(module, causal=True)(x[..., :12]).output)


@torch.no_grad()
def test_rows_of_a_batch_may_be_laid_out_differently():
    module = build()
    first, second = marked(batch=1), marked([1, 2, 2, 0, 0, 0, 1, 2], batch=1)
    together = module(torch.cat([first, second])).output
    torch.testing.assert_close(together, torch.cat([module(first).output, module(second).output]))


@torch.no_grad()
def test_answers_do_not_change_what_came_before():
    module, x = build(), marked()
    other = x.clone()
    other[:, 6:, :12] = 3.0
    torch.testing.assert_close(module(other).output[:, :6], module(x).output[:, :6])
