"""Relative position representations: the equation with its vectors per pair written out, and its identities."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.position.shaw import Shaw

close = torch.testing.assert_close


def loops(module: Shaw, x: Tensor, causal: bool, positions: list[int]) -> Tensor:
    """softmax_j(q_i . (k_j + a^K_ij) / sqrt(d)) (v_j + a^V_ij), a_ij being the row for p_j - p_i, clipped."""
    d, reach = module.head_dim, module.max_distance
    q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for head in range(module.heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else x.shape[1])
                rows = [max(-reach, min(reach, positions[j] - positions[i])) + reach for j in seen]
                keys = [k[b, j, part] + module.key_table[row] for j, row in zip(seen, rows, strict=True)]
                powers = [math.exp(float(q[b, i, part] @ key) / math.sqrt(d)) for key in keys]
                for j, row, power in zip(seen, rows, powers, strict=True):
                    mixed[b, i, part] += power / sum(powers) * (v[b, j, part] + module.value_table[row])
    return mixed @ module.o_proj.weight.T


def _module(causal: bool, **settings: int) -> Shaw:
    torch.manual_seed(0)
    return Shaw(12, 3, causal=causal, **settings).double()


@pytest.mark.parametrize("reach", [0, 2, 20])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, reach: int) -> None:
    module, x = _module(causal, max_distance=reach), torch.randn(2, 7, 12, dtype=torch.float64)
    close(module(x).output, loops(module, x, causal, list(range(7))), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_distances_are_between_positions() -> None:
    module, x = _module(False, max_distance=3), torch.randn(1, 6, 12, dtype=torch.float64)
    positions = [4, 0, 9, 2, 3, 3]
    close(
        module(x, positions=torch.tensor(positions)).output, loops(module, x, False, positions), rtol=1e-12, atol=1e-12
    )
    shifted = module(x, positions=torch.tensor(positions) + 100).output
    close(shifted, module(x, positions=torch.tensor(positions)).output, rtol=0, atol=0)


@torch.no_grad()
def test_decoding_keeps_the_distances() -> None:
    module, x = _module(True, max_distance=2), torch.randn(2, 7, 12, dtype=torch.float64)
    state = module.init_state(2)
    steps = torch.cat([module(x[:, i : i + 1], state=state).output for i in range(7)], 1)
    close(steps, loops(module, x, True, list(range(7))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_without_vectors_it_is_softmax(causal: bool) -> None:
    module, plain = _module(causal), Softmax(12, 3, causal=causal).double()
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if "table" not in n})
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    module.key_table.zero_()
    module.value_table.zero_()
    close(module(x).output, plain(x).output, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_equal_vectors_move_values_only() -> None:
    """A key vector that is the same for every distance changes no weight; such a value vector is added to each head."""
    module, plain = _module(False), Softmax(12, 3).double()
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if "table" not in n})
    x, value = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    module.key_table.copy_(torch.randn(4, dtype=torch.float64).expand_as(module.key_table))
    module.value_table.copy_(value.expand_as(module.value_table))
    close(module(x).output, plain(x).output + plain.o_proj(value.repeat(3)), rtol=1e-12, atol=1e-12)


def test_no_vector_per_pair_is_held() -> None:
    module, x, sizes = Shaw(64, 2), torch.randn(1, 40, 64), []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    assert max(sizes) < 40 * 40 * 32


def test_a_negative_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="max_distance=-1"):
        Shaw(8, 2, max_distance=-1)
