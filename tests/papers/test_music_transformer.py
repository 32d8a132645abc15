"""Music Transformer: the relative term pair by pair, the skew by hand, and blocks against their mask."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.skew import skew
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.position.music_transformer import MusicTransformer

close = torch.testing.assert_close


def loops(module: MusicTransformer, x: Tensor) -> Tensor:
    n, d = len(x), module.head_dim
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = torch.zeros_like(q)
    for h in range(module.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            first = 0 if module.block is None else max(0, i // module.block - 1) * module.block
            powers = []
            for j in range(first, i + 1):
                score = float(q[i, part] @ k[j, part])
                if i - j < module.max_distance:
                    score += float(q[i, part] @ module.distances[h, i - j])
                powers.append(math.exp(score / math.sqrt(d)))
            for j, power in zip(range(first, i + 1), powers, strict=True):
                mixed[i, part] += power / sum(powers) * v[j, part]
    return mixed @ module.o_proj.weight.T


def _module(**settings: int) -> MusicTransformer:
    torch.manual_seed(0)
    return MusicTransformer(12, 3, **settings).double()


@pytest.mark.parametrize("settings", [{}, {"max_distance": 3}, {"max_distance": 20, "block": 4}, {"block": 1}])
@pytest.mark.parametrize("n", [1, 4, 5, 11])
@torch.no_grad()
def test_equals_loops(settings: dict[str, int], n: int) -> None:
    module, x = _module(**settings), torch.randn(1, n, 12, dtype=torch.float64)
    for need_weights in (False, True):
        output = module(x, need_weights=need_weights).output[0]
        close(output, loops(module, x[0]), rtol=1e-11, atol=1e-11)


def test_skew_by_hand() -> None:
    """Columns are distances 2, 1, 0 of three queries at three keys."""
    by_distance = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert skew(by_distance, 3).tril().tolist() == [[3, 0, 0], [5, 6, 0], [7, 8, 9]]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_skew_of_all_distances(n: int, m: int) -> None:
    """Column c is distance c - (m - 1) from the query's own place, later keys included."""
    torch.manual_seed(0)
    by_distance = torch.randn(2, n, n + m - 1)
    got = skew(by_distance, m)
    for i in range(n):
        for j in range(m):
            distance = j - (m - n + i)
            close(got[:, i, j], by_distance[:, i, distance + m - 1])


@torch.no_grad()
def test_without_a_table_it_is_softmax() -> None:
    module, plain = _module(), Softmax(12, 3, causal=True).double()
    module.distances.zero_()
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if "proj" in n})
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    close(module(x).output, plain(x).output, rtol=1e-12, atol=1e-12)


def test_blocks_hold_no_matrix_of_all_pairs() -> None:
    module, x, sizes = MusicTransformer(8, 2, block=4, max_distance=8), torch.randn(1, 64, 8), []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    assert max(sizes) < 64 * 64


@torch.no_grad()
def test_a_local_state_is_bounded() -> None:
    module, x = _module(block=3), torch.randn(1, 40, 12, dtype=torch.float64)
    state = module.init_state(1)
    steps = torch.cat([module(x[:, i : i + 1], state=state).output for i in range(40)], 1)
    close(steps[0], loops(module, x[0]), rtol=1e-11, atol=1e-11)
    assert len(state.grown["keys"]) < 6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="max_distance=0"):
        MusicTransformer(8, 2, max_distance=0)
