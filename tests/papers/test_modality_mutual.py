"""AKI's mask against loops over a written-out sequence."""

import pytest
import torch

from manyheads.mechanisms.cross.modality_mutual import ModalityMutual
from manyheads.mechanisms.plain.softmax import Softmax

# begin, two image tokens, begin of the question, two question tokens, two answer tokens
KINDS = [0, 1, 1, 0, 2, 2, 0, 0]
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
    return ModalityMutual(12, 3, **config).double().eval()


def tokens(batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 8, 12).double()


def told(*rows):
    return {"token_kinds": torch.tensor(rows or (KINDS, KINDS))}


def plain_of(module, **config):
    plain = Softmax(12, 3, **config).double()
    plain.load_state_dict(module.state_dict())
    return plain


@torch.no_grad()
def test_who_sees_whom():
    weights = build()(tokens(), need_weights=True, **told()).weights
    seen = torch.tensor([[mark == "x" for mark in row] for row in SEES])
    assert torch.equal(weights[1, 2] > 0, seen)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 8).double())


@torch.no_grad()
def test_by_loops():
    module, x = build(), tokens()
    content, mixed = x[1], torch.zeros(8, 12).double()
    for i, row in enumerate(SEES):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q, seen = module.q_proj.weight[part] @ content[i], [j for j, mark in enumerate(row) if mark == "x"]
            scores = [(q @ (module.k_proj.weight[part] @ content[j]) / 2).exp() for j in seen]
            for j, score in zip(seen, scores, strict=True):
                mixed[i, part] += score / sum(scores) * (module.v_proj.weight[part] @ content[j])
    torch.testing.assert_close(module(x, **told()).output[1], module.o_proj(mixed))


@pytest.mark.parametrize("kinds", [[1] * 8, [2] * 8, [0] * 8, [2, 2, 2, 1, 1, 0, 0, 0]])
@torch.no_grad()
def test_without_a_question_after_an_image_it_is_causal_attention(kinds):
    module, x = build(), tokens()
    torch.testing.assert_close(module(x, **told(kinds, kinds)).output, plain_of(module, causal=True)(x).output)


@torch.no_grad()
def test_rows_of_a_batch_may_be_laid_out_differently():
    module = build()
    x, other = tokens(), [2, 0, 0, 1, 1, 1, 2, 0]
    alone = [module(row[None], **told(kinds)).output for row, kinds in zip(x, (KINDS, other), strict=True)]
    torch.testing.assert_close(module(x, **told(KINDS, other)).output, torch.cat(alone))


@torch.no_grad()
def test_answers_do_not_change_what_came_before():
    module, x = build(), tokens()
    other = x.clone()
    other[:, 6:] = 3.0
    torch.testing.assert_close(module(other, **told()).output[:, :6], module(x, **told()).output[:, :6])


def test_a_fourth_kind_is_refused():
    with pytest.raises(ValueError, match="modality-mutual: token_kinds go from 0 to 3; want 0 to 2"):
        build()(tokens(1), **told([0, 1, 2, 3, 0, 0, 0, 0]))
