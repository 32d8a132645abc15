"""EcoFormer's learnt hashes (arXiv:2209.09004), as ShiftAddViT released them: loops, fitting, and the module suite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.testing import examine_mechanism
from manyheads.training.hashed import Hashed, _bits

SUITE = [
    "card", "shapes", "dtype", "extreme", "round-trip", "weights", "gradients", "batch", "padding",
    "left-padding", "all-padding", "dense-mask", "no-numbers-padded",
]  # fmt: skip


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(**more: int) -> Hashed:
    torch.manual_seed(0)
    return Hashed(12, 3, **{"bits": 5, "anchors": 4, **more}).double()


@torch.no_grad()
def by_loops(module: Hashed, x: Tensor) -> Tensor:
    """x [n, e] of real tokens, one value at a time."""
    n, d, r = len(x), module.head_dim, module.bits
    mixed = torch.zeros(n, module.heads, d, dtype=x.dtype)
    for head in range(module.heads):
        own = slice(head * d, (head + 1) * d)
        units = [row / row.norm() for row in x @ module.qk_proj.weight[own].T]
        values = x @ module.v_proj.weight[own].T
        apart = [[float((unit - anchor).square().sum()) for anchor in module.anchors[head]] for unit in units]
        spread = sum(map(sum, apart)) / (n * len(apart[0]))
        codes = []
        for row in apart:
            z = [math.exp(-a / (2 * spread)) - float(m) for a, m in zip(row, module.means[head], strict=True)]
            codes.append(
                [int(sum(float(w) * v for w, v in zip(bit, z, strict=True)) > 0) for bit in module.hashes[head]]
            )
        for i in range(n):
            above, below = (r + 1) * values[i], float((r + 1) * n)
            for j in range(n):
                both = sum(a * b for a, b in zip(codes[i], codes[j], strict=True))
                above, below = above + both * values[j], below + both
            mixed[i, head] = above / below
    return module.o_proj(mixed.flatten(1))


@pytest.mark.parametrize("n", [1, 3, 12])
@torch.no_grad()
def test_equals_loops(n: int) -> None:
    module, x = made(), tokens(n)
    module.means.uniform_(0.2, 0.6)
    result = module(x, need_weights=True)
    for row in range(2):
        assert_close(module(x).output[row], by_loops(module, x[row]))
        assert_close(result.output[row], by_loops(module, x[row]))


def codes(module: Hashed, x: Tensor) -> Tensor:
    near = module._near(module._tokens(x), None) - module.means[:, None]
    return (near @ module.hashes.mT > 0).double()


@torch.no_grad()
def test_fitted_hashes_tell_neighbours_from_strangers() -> None:
    """The share of bits that agree, of the most alike tokens less that of the least alike: more than by chance."""
    module, x = made(bits=12, anchors=10), tokens(40)
    with torch.no_grad():
        module.hashes.mul_(4)

    def told() -> float:
        y, u = codes(module, x), module._tokens(x)
        agree = (y[..., :, None, :] == y[..., None, :, :]).double().mean(-1)
        alike = u @ u.mT
        near, far = (agree.gather(-1, alike.topk(6, largest=largest).indices).mean() for largest in (True, False))
        return float(near - far)

    losses = module.fit(x, nearest=6)
    assert len(losses) == 12
    fitted = told()
    again = made(bits=12, anchors=10)
    drawn = again.hashes.clone().mul_(4)
    again.hashes.copy_(drawn)
    assert again.fit(x, nearest=6) == losses  # of a seed
    module.hashes.copy_(drawn)
    assert fitted > told()


@torch.no_grad()
def test_the_first_bit_by_loops() -> None:
    """The loss of one bit, - sum_ij y_i S_ij y_j / (n r) in the mean over rows and heads."""
    module, x = made(bits=1, anchors=6), tokens(14)
    (loss,) = module.fit(x, nearest=3)
    near = module._near(module._tokens(x), None) - module.means[:, None]
    total = 0.0
    for b in range(2):
        for h in range(3):
            units = module._tokens(x)[b, h]
            y = [1 if float(near[b, h, i] @ module.hashes[h, 0]) > 0 else -1 for i in range(14)]
            for i in range(14):
                order = sorted(range(14), key=lambda j, i=i, units=units: float(units[i] @ units[j]))
                total -= sum(y[i] * y[j] for j in order[-3:]) - sum(y[i] * y[j] for j in order[:3])
    assert loss == pytest.approx(total / (14 * 6))


def test_too_few_tokens_to_learn_from() -> None:
    with pytest.raises(ValueError, match=r"8 tokens to learn hashes from; 4 anchors and 5 nearest .* want 10"):
        made().fit(tokens(8), nearest=5)
    with pytest.raises(ValueError, match="bits=0"):
        made(bits=0)


def test_a_step_passes_gradients_on_where_it_is_from_zero_to_one() -> None:
    z = torch.tensor([-0.5, 0.2, 0.9, 1.5], dtype=torch.float64, requires_grad=True)
    y = _bits(z)
    assert y.tolist() == [0, 1, 1, 1]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert z.grad is not None
    assert z.grad.tolist() == [0, 2, 3, 0]


def test_all_but_the_gradient_of_a_step_is_as_of_every_mechanism() -> None:
    assert [finding for finding in examine_mechanism(Hashed, properties=SUITE) if not finding.holds] == []
