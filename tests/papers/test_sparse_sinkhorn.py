"""Sparse Sinkhorn attention (arXiv:2002.11296) against loops over blocks."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.scoring.sparse_sinkhorn import SparseSinkhorn
from manyheads.testing import check_mechanism

D = 4


def order_of(q: list[Tensor], k: list[Tensor], temperature: float, iterations: int) -> Tensor:
    c = len(q)
    cells = [[max(float(a.mean(0) @ b.mean(0)) / math.sqrt(D), 0.0) for b in k] for a in q]
    cells = [[(cell + 1e-6) ** (1 / temperature) for cell in row] for row in cells]
    for _ in range(iterations):
        cells = [[cell / sum(row) for cell in row] for row in cells]
        for j in range(c):
            total = sum(row[j] for row in cells)
            for row in cells:
                row[j] /= total
    return torch.tensor(cells, dtype=torch.float64)


def by_loops(module: SparseSinkhorn, x: Tensor) -> tuple[Tensor, Tensor]:
    n, s = len(x), module.block
    matrix, mixed = torch.zeros(3, n, n, dtype=x.dtype), torch.zeros(n, 12, dtype=x.dtype)
    for h in range(3):
        own = slice(D * h, D * h + D)
        q, k, v = (x @ p.weight[own].T for p in (module.q_proj, module.k_proj, module.v_proj))
        blocks = [range(start, min(start + s, n)) for start in range(0, n, s)]
        order = order_of(
            [q[list(b)] for b in blocks], [k[list(b)] for b in blocks], module.temperature, module.iterations
        )
        for index, block in enumerate(blocks):
            for i in block:
                scores = [math.exp(float(q[i] @ k[j]) / math.sqrt(D)) for j in block]
                for slot in range(min(s, n)):
                    key = sum(order[index, j] * k[other[slot]] for j, other in enumerate(blocks) if slot < len(other))
                    scores.append(math.exp(float(q[i] @ key) / math.sqrt(D)))
                weights = [score / sum(scores) for score in scores]
                for j, weight in zip(block, weights, strict=False):
                    matrix[h, i, j] += weight
                for slot, weight in enumerate(weights[len(block) :]):
                    for j, other in enumerate(blocks):
                        if slot < len(other):
                            matrix[h, i, other[slot]] += weight * order[index, j]
        mixed[:, own] = matrix[h] @ v
    return mixed @ module.o_proj.weight.T, matrix


@pytest.mark.parametrize("n", [1, 3, 8, 10])
@torch.no_grad()
def test_equals_loops(n: int) -> None:
    module = SparseSinkhorn(12, 3, block=4, iterations=3).double().eval()
    x = torch.randn(2, n, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    for row in range(2):
        output, matrix = by_loops(module, x[row])
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row], matrix)


@torch.no_grad()
def test_every_block_is_given_away_whole() -> None:
    """Columns come last: after one round already they sum to 1, and rows do not. With padding the same."""
    module = SparseSinkhorn(12, 3, block=4, iterations=1).double().eval()
    q, k = torch.randn(2, 2, 3, 5, 4, D, dtype=torch.float64)
    real = torch.ones(2, 5, 4, dtype=torch.bool)
    real[1, 3:] = False
    for given in (None, real):
        order = module._order(*(t.masked_fill(~real[:, None, ..., None], 0.0) for t in (q, k)), given)
        count = 5 if given is None else 3
        torch.testing.assert_close(order.sum(2)[1, :, :count], torch.ones(3, count, dtype=torch.float64))
        assert (order.sum(3)[1, :, :count] - 1).abs().max() > 1e-3


@torch.no_grad()
def test_one_block_meets_itself_twice_and_is_plain_attention() -> None:
    module, plain = SparseSinkhorn(12, 3, block=16).double().eval(), Softmax(12, 3).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


@torch.no_grad()
def test_noise_in_training_only() -> None:
    module, x = SparseSinkhorn(12, 3, block=4), torch.randn(1, 12, 12)
    assert not torch.equal(module.train()(x).output, module(x).output)
    assert torch.equal(module.eval()(x).output, module(x).output)


def test_no_block() -> None:
    with pytest.raises(ValueError, match="block=0"):
        SparseSinkhorn(12, 3, block=0)
    with pytest.raises(ValueError, match="sorted_blocks=2 with causal=False"):
        SparseSinkhorn(12, 3, sorted_blocks=2)


# -- causal ------------------------------------------------------------------------------------------------------------


def picked(scores: list[float], module: SparseSinkhorn) -> list[tuple[int, float]]:
    """The largest share, then the largest of the rest .. : of learned blocks (-1) with score 0, and of those given."""
    left = [(-1, 0.0)] * module.sorted_blocks + list(enumerate(scores))
    found = []
    for _ in range(module.sorted_blocks):
        powers = [math.exp(score / module.temperature) for _, score in left]
        best = max(range(len(left)), key=powers.__getitem__)
        found.append((left.pop(best)[0], powers[best] / sum(powers)))
    return found


def causal_loops(module: SparseSinkhorn, x: Tensor) -> tuple[Tensor, Tensor]:
    """As sinkhorn-transformer has it, for whole blocks: the later half of the heads turn the sequence round by
    block - 1 tokens, whose first ones then stand at its end, hidden from what came before them."""
    n, s = len(x), module.block
    matrix, mixed = torch.zeros(module.heads, n, n, dtype=x.dtype), torch.zeros_like(x)
    for h in range(module.heads):
        own, turned = slice(D * h, D * h + D), h >= module.heads // 2
        q, k, v = (x @ p.weight[own].T for p in (module.q_proj, module.k_proj, module.v_proj))
        order = [*range(s - 1, n), *range(s - 1)] if turned else list(range(n))
        blocks = [order[start : start + s] for start in range(0, n, s)]
        mean_q, mean_k = ({i: t[order[: a + 1]].mean(0) for a, i in enumerate(order)} for t in (q, k))
        for index, block in enumerate(blocks):
            scores = [
                float(mean_q[block[0]] @ sum(mean_k[j] for j in other)) / math.sqrt(D) for other in blocks[:index]
            ]
            picks = picked(scores, module)
            for a, i in enumerate(block):
                wrapped = turned and index == len(blocks) - 1 and a > 0
                slots = [(j, 1.0, k[j], v[j]) for j in block[1 if wrapped else 0 : a + 1]]
                for choice, share in [] if wrapped else picks:
                    if choice < 0:
                        empty = share * module.null_keys[h, 0], share * module.null_values[h, 0]
                        slots += [(-1, share, *empty)] * s
                    else:
                        slots += [(j, share, share * k[j], share * v[j]) for j in blocks[choice]]
                powers = [math.exp(float(q[i] @ key) / math.sqrt(D)) for _, _, key, _ in slots]
                for power, (j, share, _, value) in zip(powers, slots, strict=True):
                    mixed[i, own] += power / sum(powers) * value
                    if j >= 0:
                        matrix[h, i, j] += power / sum(powers) * share
    return mixed @ module.o_proj.weight.T, matrix


@pytest.mark.parametrize(("block", "sorted_blocks", "n"), [(4, 1, 16), (3, 2, 15), (1, 1, 5), (1, 2, 6), (5, 3, 20)])
@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_the_causal_form_equals_loops(block: int, sorted_blocks: int, n: int, heads: int) -> None:
    module = SparseSinkhorn(D * heads, heads, causal=True, block=block, sorted_blocks=sorted_blocks).double()
    x = 2 * torch.randn(2, n, module.dim, dtype=torch.float64)
    result = module(x, need_weights=True)
    for row in range(2):
        output, matrix = causal_loops(module, x[row])
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row], matrix)
    torch.testing.assert_close(module(x).output, result.output)
    state = module.init_state(2)
    parts = [module(x[:, a:b], state=state).output for a, b in ((0, 2), (2, 3), (3, n))]
    torch.testing.assert_close(torch.cat(parts, 1), result.output)


@torch.no_grad()
def test_picks_matter_and_reach_far_back() -> None:
    module = SparseSinkhorn(12, 2, causal=True, block=4).double()
    weights = module(3 * torch.randn(8, 64, 12, dtype=torch.float64), need_weights=True).weights
    assert (weights[:, :, 40:, :32] > 0.01).any()


def test_blocks_hold_no_matrix_of_all_pairs() -> None:
    module, x, sizes = SparseSinkhorn(8, 2, block=4, causal=True), torch.randn(1, 256, 8), []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    assert max(sizes) < 256 * 256 / 4


def test_causal_conformance_of_several_sorted_blocks() -> None:
    check_mechanism(SparseSinkhorn, config={"sorted_blocks": 2, "block": 3}, patterns=["causal-self"])
