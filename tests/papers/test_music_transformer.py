"""Music Transformer: the relative term pair by pair, the skew by hand, and blocks against their mask."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.functional.skew import skew, unskew
from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.position.music_transformer import MusicTransformer
from manyheads.testing import check_mechanism

close = torch.testing.assert_close


def entry(module: MusicTransformer, name: str, h: int, distance: int) -> Tensor | float:
    """The vector for a key so far behind the query (negative: ahead of it)."""
    table = getattr(module, name)
    if table is None or abs(distance) >= module.max_distance:
        return 0.0
    return table[h, distance if module.causal else distance + module.max_distance - 1]


def loops(module: MusicTransformer, x: Tensor) -> Tensor:
    n, d = len(x), module.head_dim
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = torch.zeros_like(q)
    for h in range(module.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            first = 0 if module.block is None else max(0, i // module.block - 1) * module.block
            powers, seen = [], range(first, i + 1 if module.causal else n)
            for j in seen:
                score = float(q[i, part] @ (k[j, part] + entry(module, "distances", h, i - j)))
                powers.append(math.exp(score / math.sqrt(d)))
            for j, power in zip(seen, powers, strict=True):
                mixed[i, part] += power / sum(powers) * (v[j, part] + entry(module, "value_distances", h, i - j))
    return mixed @ module.o_proj.weight.T


def _module(**settings: int) -> MusicTransformer:
    torch.manual_seed(0)
    return MusicTransformer(12, 3, **settings).double()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_distance": 3},
        {"max_distance": 20, "block": 4},
        {"max_distance": 3, "block": 4},
        {"block": 1},
        {"causal": False},
        {"causal": False, "max_distance": 3},
        {"causal": False, "max_distance": 1},
    ],
)
@pytest.mark.parametrize("n", [1, 4, 5, 11])
@torch.no_grad()
def test_equals_loops(settings: dict[str, int], n: int, values: bool) -> None:
    module, x = _module(values=values, **settings), torch.randn(1, n, 12, dtype=torch.float64)
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


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_unskew_is_the_way_back(n: int, m: int) -> None:
    by_key = torch.randn(2, n, m)
    found = unskew(by_key, m)
    assert found.shape == (2, n, n + m - 1)
    close(skew(found, m), by_key)
    close(found.sum(-1), by_key.sum(-1))


@torch.no_grad()
def test_tables_are_the_released_ones_turned_round() -> None:
    """In tensor2tensor row c of the table of all distances belongs to the key c - (max_distance - 1) ahead."""
    module, x = _module(causal=False, max_distance=7), torch.randn(1, 7, 12, dtype=torch.float64)
    released = module.distances.flip(1)
    q = module.q_proj(x).unflatten(-1, (3, 4)).transpose(1, 2)
    by_distance = torch.einsum("bhld,hmd->bhlm", q, released)
    found = module._relative(q, 7)
    for i in range(7):
        for j in range(7):
            close(found[..., i, j], by_distance[..., i, j - i + 6])


@pytest.mark.parametrize("config", [{"values": True}, {"values": True, "block": 4, "max_distance": 5}])
def test_conformance_of_values(config: dict[str, int]) -> None:
    check_mechanism(MusicTransformer, config=config, patterns=["causal-self"] if "block" in config else None)


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
    with pytest.raises(ValueError, match="block=4 with causal=False"):
        MusicTransformer(8, 2, causal=False, block=4)
