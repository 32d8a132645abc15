"""MiniLMv2: the equation in loops, what must be 0 or the same, padding on either side, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.training import minilm_loss, relation_loss


def vectors(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def loops(student: Tensor, teacher: Tensor, heads: int, real: list[list[int]], causal: bool) -> float:
    """The mean over sequences; real: the places of each one's tokens."""
    total = 0.0
    for b, places in enumerate(real):
        of_sequence = 0.0
        for a in range(heads):
            for i in places:
                seen = [j for j in places if not causal or j <= i]
                rows = []
                for x in (student, teacher):
                    d = x.shape[-1] // heads
                    own = x[b, :, a * d : (a + 1) * d]
                    scores = [math.exp(float(own[i] @ own[j]) / math.sqrt(d)) for j in seen]
                    rows.append([score / sum(scores) for score in scores])
                of_sequence += sum(p * math.log(p / q) for q, p in zip(*rows, strict=True))
        total += of_sequence / (heads * max(1, len(places)))
    return total / len(real)


@pytest.mark.parametrize("causal", [False, True])
def test_the_equation_in_loops(causal: bool) -> None:
    student, teacher = vectors(3, 5, 6), vectors(3, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    real = [[i for i in range(5) if row[i]] for row in mask.tolist()]
    found = relation_loss(student, teacher, heads=3, mask=mask, causal=causal)
    assert float(found) == pytest.approx(loops(student, teacher, 3, real, causal), rel=1e-10)


def test_kinds_of_other_widths_add_up() -> None:
    sizes = ((8, 16), (4, 8), (4, 8))
    student, teacher = [vectors(2, 4, a) for a, _ in sizes], [vectors(2, 4, b) for _, b in sizes]
    alone = [relation_loss(a, b, heads=2) for a, b in zip(student, teacher, strict=True)]
    torch.testing.assert_close(minilm_loss(student, teacher, heads=2), sum(alone, torch.zeros((), dtype=torch.float64)))


def test_a_teacher_that_turns_each_head_teaches_the_same() -> None:
    x = vectors(2, 6, 12)
    turn = torch.block_diag(*(torch.linalg.qr(vectors(4, 4))[0] for _ in range(3)))
    torch.testing.assert_close(relation_loss(x @ turn, x, heads=3), torch.zeros((), dtype=torch.float64))
    assert relation_loss(x @ turn, x, heads=6) > 1e-3
    assert relation_loss(vectors(2, 6, 12), x, heads=3) > 1e-3


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_sequence_alone_is_what_it_is_beside_a_longer_one(kind: torch.dtype) -> None:
    student, teacher = vectors(1, 4, 8).to(kind), vectors(1, 4, 16).to(kind)
    alone = relation_loss(student, teacher, heads=2, causal=True)
    for side in (0, 1):
        pad = (0, 0, 3, 0) if side == 0 else (0, 0, 0, 3)
        wide = [torch.nn.functional.pad(x, pad, value=7.0) for x in (student, teacher)]
        mask = torch.nn.functional.pad(torch.ones(1, 4, dtype=torch.bool), pad[2:])
        torch.testing.assert_close(relation_loss(*wide, heads=2, mask=mask, causal=True), alone)


def test_gradients_reach_the_student_only_and_are_finite() -> None:
    student, teacher = vectors(2, 4, 8).requires_grad_(), vectors(2, 4, 8).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    relation_loss(student, teacher, heads=2, mask=mask, causal=True).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0].abs().sum() > 0
    torch.testing.assert_close(student.grad[1], torch.zeros(4, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("sizes", "heads", "words"),
    [
        (((2, 4, 8), (2, 4, 10)), 4, "4 relation heads do not divide the teacher's width 10"),
        (((2, 4, 9), (2, 4, 8)), 4, "4 relation heads do not divide the student's width 9"),
        (((2, 4, 8), (2, 5, 8)), 4, "differ in b, n"),
        (((2, 4, 8), (2, 4, 8)), 0, "0 relation heads"),
    ],
)
def test_what_is_refused(sizes: tuple[tuple[int, ...], tuple[int, ...]], heads: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        relation_loss(vectors(*sizes[0]), vectors(*sizes[1]), heads=heads)


def test_masks_and_kinds_that_do_not_fit() -> None:
    x = vectors(2, 4, 8)
    with pytest.raises(ValueError, match=r"mask \[2, 3\]; want \[2, 4\]"):
        relation_loss(x, x, heads=2, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 kinds of vectors from the student, 3 from the teacher"):
        minilm_loss([x, x], [x, x, x], heads=2)
