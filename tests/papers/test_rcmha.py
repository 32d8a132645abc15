"""RCMHA: convolutions, relative terms and biases as loops, and plain attention where they are neutral."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.position.rcmha import RCMHA

close = torch.testing.assert_close


def filtered(rows: Tensor, conv: torch.nn.Conv1d, heads: int) -> Tensor:
    """rows [n, dim]: feature f of each head has filter f, whose last tap is the token itself."""
    n, d, kernel = len(rows), rows.shape[1] // heads, conv.kernel_size[0]
    out = torch.zeros_like(rows)
    for i in range(n):
        for h in range(heads):
            for f in range(d):
                value = float(conv.bias[f])
                for tap in range(kernel):
                    j = i - (kernel - 1) + tap
                    if j >= 0:
                        value += float(conv.weight[f, 0, tap] * rows[j, h * d + f])
                out[i, h * d + f] = value
    return out


def loops(module: RCMHA, x: Tensor, causal: bool) -> Tensor:
    n, heads = len(x), module.heads
    d = x.shape[1] // heads
    q = filtered(x @ module.q_proj.weight.T, module.q_conv, heads)
    k = filtered(x @ module.k_proj.weight.T, module.k_conv, heads)
    v = filtered(x @ module.v_proj.weight.T + module.v_proj.bias, module.v_conv, heads)
    mixed = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            seen, powers = range(i + 1 if causal else n), []
            for j in seen:
                row = module.max_length - 1 + j - i
                score = (q[i, part] + module.query_bias[h]) @ k[j, part]
                score = score + q[i, part] @ module.distances[h, row] + module.distance_bias[h, row]
                powers.append(math.exp(float(score) / math.sqrt(d)))
            for j, power in zip(seen, powers, strict=True):
                mixed[i, part] += power / sum(powers) * v[j, part]
    return mixed @ module.o_proj.weight.T + module.o_proj.bias


def _module(causal: bool, **settings: int) -> RCMHA:
    torch.manual_seed(0)
    module = RCMHA(12, 3, causal=causal, **{"max_length": 9, **settings}).double()
    with torch.no_grad():
        for weight in (module.distances, module.distance_bias, module.query_bias):
            weight.copy_(torch.randn(weight.shape))
    return module


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "kernel"), [(1, 3), (6, 3), (9, 2), (5, 1)])
@torch.no_grad()
def test_equals_loops(causal: bool, n: int, kernel: int) -> None:
    module, x = _module(causal, kernel=kernel), torch.randn(1, n, 12, dtype=torch.float64)
    close(module(x).output[0], loops(module, x[0], causal), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_is_softmax_where_filters_and_tables_are_neutral() -> None:
    torch.manual_seed(0)
    module, plain = RCMHA(12, 3, max_length=9).double(), Softmax(12, 3, bias=True).double()
    for conv in (module.q_conv, module.k_conv, module.v_conv):
        conv.weight.zero_()
        conv.weight[:, :, -1] = 1.0
        conv.bias.zero_()
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if "proj" in n}, strict=False)
    plain.q_proj.bias.zero_()
    plain.k_proj.bias.zero_()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    close(module(x).output, plain(x).output, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_state_holds_what_the_filters_reach() -> None:
    module, x = _module(True, kernel=4), torch.randn(1, 9, 12, dtype=torch.float64)
    state = module.init_state(1)
    parts = [module(x[:, a:b], state=state).output for a, b in ((0, 2), (2, 3), (3, 9))]
    close(torch.cat(parts, 1)[0], loops(module, x[0], True), rtol=1e-10, atol=1e-10)
    assert state.fixed["tail"].shape == (1, 3, 3, 12)


def test_a_longer_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10 tokens .* max_length=9"):
        RCMHA(12, 3, max_length=9)(torch.randn(1, 10, 12))
