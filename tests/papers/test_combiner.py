"""Combiner (arXiv:2107.05768) against loops over tokens and regions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.selection.combiner import Combiner
from manyheads.testing import check_mechanism


def partition(module: Combiner, i: int, n: int) -> tuple[list[int], list[list[int]]]:
    """Whom i sees directly, and its regions."""
    size, row = module.block, i // module.block
    if module.partition == "logsparse":
        regions, end = [], i
        for bit in range(20):
            if i >> bit & 1:
                regions.append(list(range(end - (1 << bit), end)))
                end -= 1 << bit
        return [i], regions
    rows = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    if module.partition == "fixed":
        if module.causal:
            return [j for j in rows[row] if j <= i], rows[:row]
        return rows[row], rows[:row] + rows[row + 1 :]
    direct = [j for j in rows[row] if j <= i] + list(range(i % size, row * size, size))
    regions = [list(range(u, row * size, size)) for u in range(size) if u != i % size and row]
    if module.partition == "mixture":
        regions += [whole[: i % size] for whole in rows[:row]] + [whole[i % size + 1 :] for whole in rows[:row]]
    return direct, [region for region in regions if region]


def loops(module: Combiner, x: Tensor) -> Tensor:
    n, d, out = len(x), module.head_dim, []
    q, k, v = ((x @ getattr(module, f"{name}_proj").weight.T).split(d, -1) for name in "qkv")
    for i in range(n):
        direct, regions = partition(module, i, n)
        mixed = []
        for h in range(module.heads):
            scores, values = [float(q[h][i] @ k[h][j]) for j in direct], [v[h][j] for j in direct]
            for region in regions:
                asking, key = torch.stack([q[h][j] for j in region]), torch.stack([k[h][j] for j in region])
                inner = [math.exp(float(asking.amax(0) @ k[h][j]) / math.sqrt(d)) for j in region]
                scores.append(float(q[h][i] @ key.amax(0)))
                values.append(sum(s * v[h][j] for s, j in zip(inner, region, strict=True)) / sum(inner))  # type: ignore[arg-type]
            shares = [math.exp(s / math.sqrt(d)) for s in scores]
            mixed.append(sum(s * value for s, value in zip(shares, values, strict=True)) / sum(shares))
        out.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(out)


FORMS = [("fixed", False), ("fixed", True), ("logsparse", True), ("axial", True), ("mixture", True)]


@pytest.mark.parametrize(("name", "causal"), FORMS)
@pytest.mark.parametrize(("block", "n"), [(4, 16), (5, 23), (1, 6), (30, 9)])
def test_equals_loops(name: str, causal: bool, block: int, n: int) -> None:
    module = Combiner(8, 2, block=block, partition=name, causal=causal).double()
    x = torch.randn(2, n, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([loops(module, row) for row in x])
        torch.testing.assert_close(module(x).output, wanted)
        torch.testing.assert_close(module(x, need_weights=True).output, wanted)


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_every_token_of_the_past_has_weight(name: str, causal: bool) -> None:
    weights = (
        Combiner(16, 4, block=4, partition=name, causal=causal)
        .double()(torch.randn(2, 22, 16, dtype=torch.float64), need_weights=True)
        .weights
    )
    assert weights is not None
    seen = torch.ones(22, 22).tril().bool() if causal else torch.ones(22, 22).bool()
    assert torch.equal(weights > 0, seen.expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 22, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_one_row_is_plain_attention(causal: bool) -> None:
    module, plain = Combiner(16, 4, block=30, causal=causal).double(), Softmax(16, 4, causal=causal).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


@pytest.mark.parametrize("name", ["logsparse", "axial", "mixture"])
def test_conformance_of_the_other_partitions(name: str) -> None:
    names = ["decode", "decode-padded", "padding", "left-padding", "weights", "no-future", "gradcheck", "all-padding"]
    check_mechanism(Combiner, config={"partition": name}, properties=names, patterns=["causal-self"])


def test_equal_keys_make_regions_exact_up_to_their_size() -> None:
    """With zero keys every score is zero: a region weighs as much as a token, and shares that among its tokens."""
    module = Combiner(8, 1, block=3, causal=True).double()
    torch.nn.init.zeros_(module.k_proj.weight)
    weights = module(torch.randn(1, 7, 8, dtype=torch.float64), need_weights=True).weights
    assert weights is not None
    torch.testing.assert_close(weights[0, 0, 6], torch.tensor([1 / 9] * 6 + [1 / 3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"partition": "square"}, "want one of"),
        ({"block": 0}, "block >= 1"),
        ({"partition": "axial"}, "causal form only"),
    ],
)
def test_refuses(config: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Combiner(16, 4, **config)  # type: ignore[arg-type]
