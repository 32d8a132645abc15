"""Selective self-attention (arXiv:2411.12892) against loops."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.plain.softmax import Softmax
from manyheads.mechanisms.scoring.selective_temperature import SelectiveTemperature


def build(**config):
    module = SelectiveTemperature(12, 3, **config).double()
    with torch.no_grad():
        for parameter in (module.query_selector, module.value_selector, module.position_logit):
            parameter.normal_()
    return module


def by_loops(module: SelectiveTemperature, x: Tensor, source: Tensor) -> Tensor:
    rows = []
    share = 1 / (1 + math.exp(-float(module.position_logit)))
    for i in range(len(x)):
        mixed = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q = module.q_proj.weight[part] @ x[i]
            seen = i + 1 if module.causal else len(source)
            temperature = math.tanh(float(module.query_selector[h] @ q)) + 1 + share * math.log(seen)
            total = torch.zeros(4, dtype=x.dtype)
            keys = [module.k_proj.weight[part] @ source[j] for j in range(seen)]
            terms = [math.exp(temperature * float(q @ k) / 2) for k in keys]
            for j in range(seen):
                v = module.v_proj.weight[part] @ source[j]
                total += terms[j] / sum(terms) * (1 + math.tanh(float(module.value_selector[h] @ v))) * v
            mixed.append(total)
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool) -> None:
    module, x = build(causal=causal), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, torch.stack([by_loops(module, row, row) for row in x]))


@torch.no_grad()
def test_context_counts_its_real_tokens() -> None:
    module = build()
    x, context = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    found = module(x, context, mask=mask).output
    for row, real in enumerate((6, 2)):
        torch.testing.assert_close(found[row], by_loops(module, x[row], context[row, :real]))


@torch.no_grad()
def test_without_selectors_the_released_position_scale_remains() -> None:
    """Logits of query i times 1 + exp(-exp(1.5)) log i, at the initial values."""
    module = SelectiveTemperature(12, 3, causal=True).double()
    plain = Softmax(12, 3, causal=True).double()
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if name.endswith("proj.weight")})
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    weights, logits = module(x, need_weights=True).weights, plain(x, need_weights=True).weights.log()
    scale = 1 + math.exp(-math.exp(1.5)) * torch.arange(1, 10, dtype=torch.float64).log()
    torch.testing.assert_close(weights, (logits * scale[:, None]).softmax(-1), rtol=2e-3, atol=2e-4)


@torch.no_grad()
def test_a_higher_temperature_logit_sharpens() -> None:
    module, x = SelectiveTemperature(12, 3).double(), torch.randn(1, 9, 12, dtype=torch.float64)
    flat = module(x, need_weights=True).weights
    module.position_logit.fill_(5.0)
    sharp = module(x, need_weights=True).weights
    assert (sharp.amax(-1) > flat.amax(-1)).all()
