"""Landmark attention (arXiv:2305.16300) against loops over blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.landmark import Landmark
from manyheads.testing import check_mechanism


def row_weights(scores: list[float], i: int, block: int, top_k: int | None) -> dict[int, float]:
    """The weight of each token for query i, from its scores with all tokens."""

    def softmax(members: list[int]) -> dict[int, float]:
        total = sum(math.exp(scores[j]) for j in members)
        return {j: math.exp(scores[j]) / total for j in members}

    own = i // block
    marks = sorted((b * block + block - 1 for b in range(own)), key=lambda j: -scores[j])
    marks = marks if top_k is None else marks[:top_k]
    near = [j for j in range(own * block, i + 1) if j % block != block - 1]
    group = softmax(near + marks) if near + marks else {}
    found = {j: group[j] for j in near}
    for mark in marks:
        inside = softmax(list(range(mark - block + 1, mark)))
        found.update({j: group[mark] * share for j, share in inside.items()})
    return found


def loops(module: Landmark, x: Tensor) -> Tensor:
    d, rows = module.head_dim, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    for i in range(len(x)):
        mixed = []
        for h in range(module.heads):
            scores = [float(q[h][i] @ key) / math.sqrt(d) for key in k[h]]
            weights = row_weights(scores, i, module.block, module.top_k)
            mixed.append(sum((w * v[h][j] for j, w in weights.items()), torch.zeros(d, dtype=x.dtype)))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize(("block", "top_k"), [(4, None), (5, 2), (2, 1), (3, 20), (50, 1)])
def test_equals_loops(block: int, top_k: int | None) -> None:
    module = Landmark(16, 4, block=block, top_k=top_k).double()
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


def test_rows_sum_to_one_and_landmarks_have_no_weight() -> None:
    weights = Landmark(16, 4, block=4)(torch.randn(2, 30, 16), need_weights=True).weights
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 30))
    assert (weights[..., 3::4] == 0).all()


def test_before_the_first_landmark_it_is_plain_attention() -> None:
    module, plain = Landmark(16, 4, block=21, top_k=1).double(), Softmax(16, 4, causal=True).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_conformance_with_every_block_open() -> None:
    names = ["decode", "decode-padded", "padding", "left-padding", "weights", "no-future", "all-padding", "dense-mask"]
    check_mechanism(Landmark, config={"top_k": None}, properties=names)


def test_decoding_reads_no_block_that_was_not_opened() -> None:
    module = Landmark(16, 1, block=4, top_k=1).double()
    x = torch.randn(1, 14, 16, dtype=torch.float64)
    with torch.no_grad():
        weights = module(x, need_weights=True).weights
        assert weights is not None
        opened = next(b for b in range(3) if weights[0, 0, 13, 4 * b] > 0)
        state = module.init_state(1)
        module(x[:, :13], state=state)
        values = state.grown["values"].view()
        for b in range(3):
            if b != opened:
                values[:, :, 4 * b : 4 * b + 4] = torch.nan
        torch.testing.assert_close(module(x[:, 13:], state=state).output, module(x).output[:, 13:])


@pytest.mark.parametrize(("block", "top_k"), [(1, None), (4, 0)])
def test_refuses(block: int, top_k: int | None) -> None:
    with pytest.raises(ValueError, match="want a block"):
        Landmark(16, 4, block=block, top_k=top_k)
