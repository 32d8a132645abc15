"""Agent attention against loops, with its pooling and bias tables read by torch's own functions."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.tokens.agent import Agent
from manyheads.testing import check_mechanism


def build(**config):
    torch.manual_seed(0)
    module = Agent(12, 3, **{"agents": 4, "window": 5, **config}).double().eval()
    with torch.no_grad():
        module.block_bias.normal_()
        module.line_bias.normal_()
    return module


def biases(module, side, height, width):
    """B of one side, [heads, agents, height, width]."""
    block = F.interpolate(module.block_bias[side], size=(height, width), mode="bilinear")
    tall = F.interpolate(module.line_bias[side, 0], size=height, mode="linear")
    wide = F.interpolate(module.line_bias[side, 1], size=width, mode="linear")
    return block + tall[..., None] + wide[..., None, :]


def by_loops(module, x, layout):
    """x [height, width, dim], every pixel real; agents in rows and columns as in layout."""
    height, width, dim = x.shape
    heads, n = module.heads, height * width
    d = dim // heads
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    agents = F.adaptive_avg_pool2d(q.permute(2, 0, 1), layout).flatten(1).T
    asking, answering = (biases(module, side, height, width).flatten(2) for side in (0, 1))
    q, k, flat_v = q.reshape(n, dim), k.reshape(n, dim), v.reshape(n, dim)
    mixed, matrix = torch.zeros(n, dim, dtype=x.dtype), torch.zeros(heads, n, n, dtype=x.dtype)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        gather = []
        for a in range(len(agents)):
            score = torch.stack([agents[a, part] @ k[j, part] / d**0.5 + asking[h, a, j] for j in range(n)])
            gather.append(score.exp() / score.exp().sum())
        for i in range(n):
            score = torch.stack(
                [q[i, part] @ agents[a, part] / d**0.5 + answering[h, a, i] for a in range(len(agents))]
            )
            weights = score.exp() / score.exp().sum()
            matrix[h, i] = sum(weights[a] * gather[a] for a in range(len(agents)))
            mixed[i, part] = matrix[h, i] @ flat_v[:, part]
    conv = F.conv2d(v.permute(2, 0, 1)[None], module.dwc.weight, module.dwc.bias, padding=1, groups=dim)[0]
    return module.o_proj(mixed.view(height, width, dim) + conv.permute(1, 2, 0)), matrix


@pytest.mark.parametrize(("height", "width"), [(5, 5), (3, 4), (1, 1)])
@torch.no_grad()
def test_equation_on_a_grid(height, width):
    module, x = build(), torch.randn(2, height, width, 12).double()
    result = module(x, need_weights=True)
    for row in range(2):
        output, matrix = by_loops(module, x[row], (2, 2))
        torch.testing.assert_close(result.output[row], output)
        torch.testing.assert_close(result.weights[row], matrix)


@pytest.mark.parametrize("n", [1, 3, 9])
@torch.no_grad()
def test_equation_on_a_sequence(n):
    module, x = build(), torch.randn(2, n, 12).double()
    result = module(x, need_weights=True)
    output, matrix = by_loops(module, x[1][None], (1, 4))
    torch.testing.assert_close(result.output[1], output[0])
    torch.testing.assert_close(result.weights[1], matrix)


@torch.no_grad()
def test_lines_at_their_own_size_are_read_as_they_are():
    module = build(window=6)
    torch.testing.assert_close(
        biases(module, 0, 6, 6) - F.interpolate(module.block_bias[0], size=(6, 6), mode="bilinear"),
        module.line_bias[0, 0][..., None] + module.line_bias[0, 1][..., None, :],
    )
    x = torch.randn(1, 6, 6, 12).double()
    torch.testing.assert_close(module(x).output[0], by_loops(module, x[0], (2, 2))[0])


@torch.no_grad()
def test_padding_on_any_side():
    module, small = build(), torch.randn(1, 4, 3, 12).double()
    x, mask = torch.full((1, 7, 6, 12), 1e3).double(), torch.zeros(1, 7, 6, dtype=torch.bool)
    x[:, 1:5, 2:5], mask[:, 1:5, 2:5] = small, True
    torch.testing.assert_close(module(x, mask=mask).output[:, 1:5, 2:5], module(small).output)
    line, real = x[:, 1], torch.tensor([[False, False, True, True, True, False]])
    torch.testing.assert_close(module(line, mask=real).output[:, 2:5], module(line[:, 2:5]).output)


@torch.no_grad()
def test_one_agent_of_one_token_sees_values_as_they_are():
    module, x = build(agents=1), torch.randn(1, 1, 12).double()
    wanted = module.v_proj(x) * (1 + module.dwc.weight[:, 0, 1, 1]) + module.dwc.bias
    torch.testing.assert_close(module(x).output, module.o_proj(wanted))


def test_refusals():
    x = torch.randn(1, 3, 3, 12).double()
    with pytest.raises(ValueError, match=r"square number of agents, not 5; take 4 or 9"):
        build(agents=5)(x)
    with pytest.raises(ValueError, match="dense mask"):
        build()(x[:, 0], mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


@torch.no_grad()
def test_the_swin_form_is_each_window_as_a_grid_of_its_own():
    module, x = build(square=3), torch.randn(1, 5, 4, 12).double()
    mask = torch.ones(1, 5, 4, dtype=torch.bool)
    for given, (height, width) in (({}, (5, 4)), ({"mask": mask}, (4, 3))):
        mask[:, 4], mask[:, :, 3] = False, False
        output = module(x, **given).output[0]
        for i in range(0, height, 3):
            for j in range(0, width, 3):
                cut = slice(i, min(i + 3, height)), slice(j, min(j + 3, width))
                torch.testing.assert_close(output[cut], by_loops(module, x[0][cut], (2, 2))[0])


def by_reduction(module, x):
    """x [height, width, 12]: the PVT form with torch's own resizing."""
    height, width, dim = x.shape
    part, side, heads, d = module.reduced, module.reduced.side, module.heads, dim // module.heads
    filled = F.pad(x.permute(2, 0, 1), (0, -width % side, 0, -height % side))[None]
    small = part.norm(F.conv2d(filled, part.sr.weight, part.sr.bias, stride=side)[0].permute(1, 2, 0))
    q, k, v = module.q_proj(x), module.k_proj(small), module.v_proj(small)
    agents = F.adaptive_avg_pool2d(q.permute(2, 0, 1), (2, 2)).flatten(1).T
    q, k, agents, flat = (t.reshape(-1, heads, d).transpose(0, 1) for t in (q, k, agents, v))
    asking, answering = biases(module, 0, *small.shape[:2]), biases(module, 1, height, width)
    gathered = (agents @ k.mT / d**0.5 + asking.flatten(2)).softmax(-1) @ flat
    mixed = (q @ agents.mT / d**0.5 + answering.flatten(2).mT).softmax(-1) @ gathered
    wide = F.interpolate(v.permute(2, 0, 1)[None], (height, width), mode="bilinear")
    conv = F.conv2d(wide, module.dwc.weight, module.dwc.bias, padding=1, groups=dim)[0].permute(1, 2, 0)
    return module.o_proj(mixed.transpose(0, 1).reshape(x.shape) + conv)


@pytest.mark.parametrize("reduction", [2, 4])
@torch.no_grad()
def test_the_pvt_form(reduction):
    module, x = build(reduction=reduction), torch.randn(2, 8, 6, 12).double()
    torch.testing.assert_close(module(x).output[1], by_reduction(module, x[1]))
    mask = torch.ones(2, 8, 6, dtype=torch.bool)
    mask[1, 5:], mask[1, :, 4:] = False, False
    torch.testing.assert_close(module(x, mask=mask).output[1, :5, :4], by_reduction(module, x[1, :5, :4]))


@pytest.mark.parametrize("config", [{"square": 3}, {"reduction": 2}])
def test_the_forms_keep_the_contract(config):
    kept = ["shapes", "batch", "grid-padding", "all-padding", "extreme", "gradients", "no-numbers-padded", "dtype"]
    check_mechanism(Agent, config=config, patterns=["grid"], properties=kept, largest=5)


def test_the_forms_want_a_grid():
    for config in ({"square": 3}, {"reduction": 2}):
        with pytest.raises(ValueError, match="wants a grid"):
            build(**config)(torch.randn(1, 4, 12).double())
    with pytest.raises(ValueError, match="must be positive"):
        build(square=0)
