"""InLine attention: both terms as loops over pairs and neighbours, injectivity, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.inline import InLine
from manyheads.testing import check_mechanism


def built(**config: object) -> InLine:
    torch.manual_seed(0)
    return InLine(12, 3, **config).double()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def kernel(module: InLine, row: Tensor) -> Tensor:
    """[e, 9] from one sequence [n, e], head by head."""
    mean, found = row.mean(0), []
    for h in range(3):
        part, wide = slice(4 * h, 4 * h + 4), slice(36 * h, 36 * h + 36)
        inner = module.near_in.weight[part, :, 0] @ mean[part] + module.near_in.bias[part]
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        found.append((module.near_out.weight[wide, :, 0] @ inner + module.near_out.bias[wide]).view(4, 9))
    return torch.cat(found)


def far(module: InLine, row: Tensor, phi: object) -> Tensor:
    """The pairwise weights, one by one."""
    q, k, v = phi(module.q_proj(row)), phi(module.k_proj(row)), module.v_proj(row)
    out, n = torch.zeros_like(row), len(row)
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        for i in range(n):
            scores = [float(q[i, part] @ k[j, part]) / 2 for j in range(n)]
            for j in range(n):
                out[i, part] += (scores[j] - sum(scores) / n + 1) / n * v[j, part]
    return out


KERNELS = [
    ("identity", lambda x: x),
    ("relu", lambda x: x.clamp(min=0)),
    ("leaky-relu", lambda x: x.clamp(min=0) + 0.01 * x.clamp(max=0)),
    ("exp", lambda x: 2.718281828459045 ** (0.2 * x)),
]


@pytest.mark.parametrize(("name", "phi"), KERNELS)
@torch.no_grad()
def test_a_grid_equals_the_equation(name: str, phi: object) -> None:
    module, x = built(kernel=name), noise(2, 3, 4, 12)
    wanted = torch.zeros_like(x)
    for b in range(2):
        row = x[b].flatten(0, 1)
        v, r = module.v_proj(x[b]), kernel(module, row)
        wanted[b] = far(module, row, phi).view(3, 4, 12)
        for y in range(3):
            for z in range(4):
                for tap in range(9):
                    above, beside = y + tap // 3 - 1, z + tap % 3 - 1
                    if 0 <= above < 3 and 0 <= beside < 4:
                        wanted[b, y, z] += r[:, tap] * v[above, beside]
    assert_close(module(x).output, module.o_proj(wanted))


@torch.no_grad()
def test_a_sequence_has_its_neighbours_in_a_line() -> None:
    module, x = built(), noise(2, 11, 12)
    wanted = torch.zeros_like(x)
    for b in range(2):
        v, r = module.v_proj(x[b]), kernel(module, x[b])
        wanted[b] = far(module, x[b], lambda t: t)
        for i in range(11):
            for tap in range(9):
                if 0 <= i + tap - 4 < 11:
                    wanted[b, i] += r[:, tap] * v[i + tap - 4]
    assert_close(module(x).output, module.o_proj(wanted))


@torch.no_grad()
def test_rows_of_weights_sum_to_one_and_tell_queries_of_one_direction_apart() -> None:
    module, x = built(bias=False), noise(1, 6, 12)
    x[0, 1] = 2 * x[0, 0]  # a kernel that divides by its sum gives both the same weights
    weights = module(x, need_weights=True).weights
    assert_close(weights.sum(-1), torch.ones(1, 3, 6, dtype=torch.float64))
    uniform = torch.full_like(weights[0, :, 0], 1 / 6)
    assert_close(weights[0, :, 1] - uniform, 2 * (weights[0, :, 0] - uniform))
    assert (weights[0, :, 1] - weights[0, :, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_term_is_what_the_weights_say() -> None:
    module, x = built(), noise(2, 7, 12)
    module.near_out.weight.zero_()
    module.near_out.bias.zero_()
    result = module(x, need_weights=True)
    v = module.v_proj(x).unflatten(-1, (3, 4)).transpose(1, 2)
    assert_close(module.o_proj((result.weights @ v).transpose(1, 2).flatten(-2)), result.output)


@torch.no_grad()
def test_a_kernel_of_one_tap_adds_the_value_itself() -> None:
    module, x = built(), noise(1, 4, 5, 12)
    module.near_out.weight.zero_()
    module.near_out.bias.zero_()
    without = module(x).output
    module.near_out.bias.view(12, 9)[:, 4] = 1.0
    added = module(x).output - without
    assert_close(added, module.v_proj(x) @ module.o_proj.weight.T)


@pytest.mark.parametrize("name", [name for name, _ in KERNELS])
def test_huge_inputs_stay_finite(name: str) -> None:
    module, x = built(kernel=name).float(), (1e4 * noise(2, 9, 12)).float().requires_grad_()
    output = module(x).output
    output.sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="inline: kernel='elu'"):
        InLine(12, 3, kernel="elu")
    with pytest.raises(ValueError, match="inline: a dense mask"):
        built()(noise(2, 3, 12), mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))


@torch.no_grad()
def test_the_swin_form_is_each_window_as_a_grid_of_its_own() -> None:
    module, whole, x = built(square=2), built(), noise(2, 5, 3, 12)
    whole.load_state_dict(module.state_dict())
    output = module(x).output
    for i in range(0, 5, 2):
        for j in range(0, 3, 2):
            cut = (slice(None), slice(i, i + 2), slice(j, j + 2))
            assert_close(output[cut], whole(x[cut]).output)


def test_the_swin_form_keeps_the_contract() -> None:
    kept = ["shapes", "batch", "grid-padding", "all-padding", "extreme", "gradients", "no-numbers-padded"]
    check_mechanism(InLine, config={"square": 2}, patterns=["grid"], properties=kept, largest=5)
    with pytest.raises(ValueError, match="wants a grid"):
        built(square=2)(noise(1, 4, 12))
    with pytest.raises(ValueError, match="square=0"):
        built(square=0)
