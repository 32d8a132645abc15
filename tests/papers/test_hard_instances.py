"""Masked hard instance mining: which instances go, by counting ranks; the loss and the teacher by their formulas."""

import math

import pytest
import torch

from manyheads import create_attention
from manyheads.card import Pattern
from manyheads.registry import list_attentions, mechanism_class
from manyheads.testing import Case
from manyheads.training import HardInstanceMining


def build(name="efficient-probing", **config):
    torch.manual_seed(0)
    module = HardInstanceMining(create_attention(name, 8, 2).double(), **config).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))  # teacher and student differ
    return module


@torch.no_grad()
def test_of_the_highest_a_random_part_is_masked():
    module, scores = build(high=0.2, pick=0.5), torch.randn(1, 20).double()
    real, seen = torch.ones(1, 20, dtype=torch.bool), set()
    for _ in range(30):
        gone = set((~module.kept(scores, real))[0].nonzero()[:, 0].tolist())
        assert len(gone) == 4
        assert gone <= set(scores[0].topk(8).indices.tolist())
        seen |= gone
    assert seen == set(scores[0].topk(8).indices.tolist())


@torch.no_grad()
def test_lowest_random_and_padding():
    scores, real = torch.randn(1, 20).double(), torch.ones(1, 20, dtype=torch.bool)
    real[0, 10:] = False
    wanted = set(scores[0, :10].topk(7, largest=False).indices.tolist())
    kept = build(high=0.0, low=0.7).kept(scores, real)
    assert set((~kept[0, :10]).nonzero()[:, 0].tolist()) == wanted
    assert not kept[0, 10:].any()
    module = build(high=0.0, random=0.3)
    counts = sum((~module.kept(scores, real)[0, :10]).long() for _ in range(200))
    assert counts.sum() == 600
    assert counts.min() > 30
    assert build(high=0.9, pick=0.5).kept(scores, real).sum() == 1  # more than all cannot be picked from
    assert build(high=1.0, pick=1.0).kept(scores, real).sum() == 10  # nothing left: all are kept
    module = build(high=0.9, pick=0.5)
    module.high = 0.2  # set anew between steps
    gone = [set((~module.kept(scores, real)[0, :10]).nonzero()[:, 0].tolist()) for _ in range(30)]
    assert {len(g) for g in gone} == {2}
    assert set().union(*gone) == set(scores[0, :10].topk(4).indices.tolist())


@pytest.mark.parametrize("name", ["efficient-probing", "lama"])
def test_the_student_reads_what_is_left_and_the_loss_is_cross_entropy_with_the_teacher(name):
    module, x = build(name, high=0.3, pick=1.0, temperature=0.5), torch.randn(2, 10, 8).double()
    mask = torch.tensor([[True] * 10, [True] * 6 + [False] * 4])
    result = module(x, mask=mask, need_weights=True)
    teacher = module.teacher(x, mask=mask, need_weights=True)
    loss = 0.0
    for row, n in enumerate((10, 6)):
        attention = teacher.weights[row, :, 0].mean(0)
        gone = sorted(range(n), key=lambda i: -attention[i])[: math.ceil(0.3 * n)]
        kept = [i for i in range(n) if i not in gone]
        torch.testing.assert_close(result.output[row], module.student(x[row : row + 1, kept]).output[0])
        target = (teacher.output[row] / 0.5).exp()
        guess = result.output[row].exp()
        loss -= sum(target[d] / target.sum() * (guess[d] / guess.sum()).log() for d in range(8)) / 2
    torch.testing.assert_close(result.losses["consistency"], loss)
    result.losses["consistency"].backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    assert all(p.grad is not None for p in module.student.parameters())


@torch.no_grad()
def test_the_teacher_is_a_running_average():
    module = build(momentum=0.9)
    before = [p.clone() for p in module.teacher.parameters()]
    module.update()
    for old, now, student in zip(before, module.teacher.parameters(), module.student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * student)


@torch.no_grad()
def test_eval_is_the_student_and_the_teacher_never_trains():
    module, x = build("acmil"), torch.randn(2, 10, 8).double()
    assert not module.teacher.training
    assert module.student.training
    assert set(module(x).losses) == {"diversity", "consistency"}
    torch.testing.assert_close(module.eval()(x).output, module.student(x).output)
    empty = module.train()(x, mask=torch.zeros(2, 10, dtype=torch.bool))
    assert empty.losses["consistency"] == 0


def test_refusals():
    with pytest.raises(ValueError, match="no pool"):
        build("softmax")
    with pytest.raises(ValueError, match="momentum"):
        build(momentum=1.5)


@pytest.mark.parametrize("name", list_attentions(pattern="pool"))
def test_every_pool_of_the_registry(name):
    case = Case(mechanism_class(name), Pattern.POOL)
    for nothing in (False, True):
        module = HardInstanceMining(case.build(), high=0.3, low=0.1, random=0.1).train()
        x = case.x(9).requires_grad_()
        result = module(x, mask=torch.full((2, 9), not nothing))
        (result.output.sum() + sum(result.losses.values())).backward()
        module.update()
        assert bool(result.output.isfinite().all())
        assert all(bool(loss.isfinite()) for loss in result.losses.values())
        assert bool(x.grad.isfinite().all())
