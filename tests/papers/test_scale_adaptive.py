"""Scale-adaptive attention against loops; its limits."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from manyheads.mechanisms.position import scale_adaptive
from manyheads.mechanisms.position.scale_adaptive import ScaleAdaptive


def build():
    torch.manual_seed(0)
    module = ScaleAdaptive(12, 3).double()
    torch.nn.init.normal_(module.tau.weight)
    return module


@torch.no_grad()
def test_equation(monkeypatch):
    module, x, places = build(), torch.randn(2, 5, 12).double(), torch.randn(2, 5, 2).double()
    a, rows = module.attention, []
    q, k, v = (p(x[1]).view(5, 3, 4) for p in (a.q_proj, a.k_proj, a.v_proj))
    for i in range(5):
        tau, heads = module.tau(x[1, i]), []
        for h in range(3):
            scores = torch.stack(
                [q[i, h] @ k[j, h] / 2 - tau[h] * torch.dist(places[1, i], places[1, j]) for j in range(5)]
            )
            heads.append(scores.softmax(0) @ v[:, h])
        rows.append(a.o_proj(torch.cat(heads)))
    for size in (512, 2):
        monkeypatch.setattr(scale_adaptive, "ROWS", size)
        result = module(x, places=places, need_weights=True)
        torch.testing.assert_close(result.output[1], torch.stack(rows))
        torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 3, 5).double())


@torch.no_grad()
def test_no_fall_off_is_plain_attention_and_a_steep_one_leaves_each_to_itself():
    module, x, places = build(), torch.randn(2, 5, 12).double(), torch.randn(2, 5, 2).double()
    module.tau.weight.zero_()
    module.tau.bias.zero_()
    a = module.attention
    q, k, v = (a.split(p(x)) for p in (a.q_proj, a.k_proj, a.v_proj))
    torch.testing.assert_close(module(x, places=places).output, a.join(scaled_dot_product_attention(q, k, v)))
    module.tau.bias.fill_(1e6)
    torch.testing.assert_close(module(x, places=places).output, a.o_proj(a.v_proj(x)))


def test_start_and_places_without_gradient():
    module = ScaleAdaptive(16, 8)
    assert bool((module.tau.weight == 0).all())
    assert 0 <= float(module.tau.bias.detach().min()) <= float(module.tau.bias.detach().max()) <= 2
    places = torch.randn(1, 3, 2, requires_grad=True)
    module(torch.randn(1, 3, 16), places=places).output.sum().backward()
    assert places.grad is None


def test_padding_may_stand_nowhere():
    module, x, places = build(), torch.randn(1, 4, 12).double(), torch.randn(1, 4, 2).double()
    places[0, 3] = torch.nan
    mask = torch.tensor([[True, True, True, False]])
    output = module(x, places=places, mask=mask).output[:, :3]
    torch.testing.assert_close(output, module(x[:, :3], places=places[:, :3]).output)
    output.sum().backward()
    assert bool(module.tau.bias.grad.isfinite().all())


def test_refusals():
    x = torch.randn(2, 4, 12).double()
    for wrong in (torch.zeros(2, 3, 2), torch.zeros(4, 2), torch.zeros(2, 4, 2).long(), 3):
        with pytest.raises(ValueError, match="places are"):
            build()(x, places=wrong)
