"""L-query attention: means of the last tokens as loops, and multi-query attention as a sum of two."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.projection.l_query import LQuery, transition_loss

close = torch.testing.assert_close


def branch_loops(branch: Any, x: Tensor, real: list[bool], window: int, heads: int) -> Tensor:
    """One sequence; tokens that are not real are in no mean and take no weight."""
    n, dim = x.shape
    d, out = dim // heads, torch.zeros_like(x)
    k, v = (x @ branch[part].weight.T + branch[part].bias for part in ("k_proj", "v_proj"))
    for i in range(n):
        recent = [x[j] for j in range(max(0, i - window + 1), i + 1) if real[j]]
        if not recent:
            continue
        q = branch["q_proj"].weight @ (sum(recent) / len(recent)) + branch["q_proj"].bias
        seen = [j for j in range(i + 1) if real[j]]
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            powers = [math.exp(float(q[part] @ k[j, part]) / math.sqrt(d)) for j in seen]
            for j, power in zip(seen, powers, strict=True):
                out[i, part] += power / sum(powers) * v[j, part]
    return out


def loops(module: LQuery, x: Tensor, real: list[bool]) -> Tensor:
    out = (1 - module.alpha) * branch_loops(module.long, x, real, module.window, module.heads)
    if module.short is not None:
        out = out + module.alpha * branch_loops(module.short, x, real, 1, module.heads)
    return out


def _module(**settings: Any) -> LQuery:
    torch.manual_seed(0)
    return LQuery(12, 3, **settings).double()


@pytest.mark.parametrize("settings", [{}, {"window": 1}, {"window": 5, "alpha": 0.0}, {"window": 20, "alpha": 0.9}])
@torch.no_grad()
def test_equals_loops(settings: dict[str, Any]) -> None:
    module, x = _module(**settings), torch.randn(1, 7, 12, dtype=torch.float64)
    close(module(x).output[0], loops(module, x[0], [True] * 7), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_means_pass_over_padding() -> None:
    module, x = _module(window=3), torch.randn(1, 8, 12, dtype=torch.float64)
    real = [True, True, False, True, False, False, True, True]
    output = module(torch.where(torch.tensor(real)[:, None], x, 1e3), mask=torch.tensor([real])).output[0]
    wanted = loops(module, x[0], real)
    close(output[torch.tensor(real)], wanted[torch.tensor(real)], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_window_of_one_with_one_set_of_weights_is_one_attention() -> None:
    module, single = _module(window=1, alpha=0.3), _module(window=1, alpha=0.0)
    module.short.load_state_dict(module.long.state_dict())
    single.long.load_state_dict(module.long.state_dict())
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    one, other = module(x, need_weights=True), single(x, need_weights=True)
    close(one.output, other.output, rtol=1e-12, atol=1e-12)
    close(one.weights, other.weights, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_decoding_remembers_the_window() -> None:
    module, x = _module(window=4), torch.randn(1, 9, 12, dtype=torch.float64)
    state = module.init_state(1)
    parts = [module(x[:, a:b], state=state).output for a, b in ((0, 1), (1, 3), (3, 9))]
    close(torch.cat(parts, 1)[0], loops(module, x[0], [True] * 9), rtol=1e-11, atol=1e-11)
    assert state.fixed["tail"].shape == (1, 3, 13)


def test_transition_loss_equals_loops() -> None:
    items = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([[0, 4, 1, 0, 0], [0, 0, 2, 2, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [3, 0, 0, 9, 0]])
    heads, total = [0, 4, 4, 3], 0.0
    for i in heads:
        most = max(1, int(counts[i].max()))
        labels = [math.exp(int(count) / most / 0.5) for count in counts[i]]
        logits = [math.sqrt(3) * float(items[i].detach() @ item) / 0.5 for item in items.detach()]
        norm = math.log(sum(math.exp(logit) for logit in logits))
        total -= sum(label / sum(labels) * (logit - norm) for label, logit in zip(labels, logits, strict=True)) / 4
    loss = transition_loss(items, counts, torch.tensor([heads]), temperature=0.5)
    close(loss.item(), total)
    loss.backward()
    assert bool((items.grad != 0).any())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="window=0"):
        LQuery(8, 2, window=0)
    with pytest.raises(ValueError, match=r"alpha=1\.0"):
        LQuery(8, 2, alpha=1.0)
