"""Multi-source combinations against torch.nn.MultiheadAttention and plain loops."""

import pytest
import torch
from torch import nn

from manyheads.mechanisms.cross.multi_source import MODES, MultiSource


def build(mode, **config):
    torch.manual_seed(0)
    module = MultiSource(12, 3, mode=mode, sources=3, **config).double().eval()
    with torch.no_grad():
        for norm in module.norms:
            norm.weight.normal_()
            norm.bias.normal_()
    return module


def inputs(n=4):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(2, m, 12, generator=generator, dtype=torch.float64) for m in (n, 5, 3, 20)]
    mask = tuple(torch.arange(m)[None] < torch.tensor([[m], [m - 2]]) for m in (5, 3, 20))
    return draw[0], tuple(draw[1:]), mask


def reference(ours):
    """torch's multi-head attention with our parameters: (query, source, padding) -> [b, n, e]."""
    theirs = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double().eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    return lambda x, source, real: theirs(x, source, source, key_padding_mask=~real, need_weights=False)[0]


def expected(module, x, context, mask):
    a = [reference(each) for each in module.attention]
    if module.mode == "flat":
        return a[0](x, torch.cat(context, 1), torch.cat(mask, 1))
    if module.mode == "serial":
        stream = x + a[0](x, context[0], mask[0])
        for i in (1, 2):
            stream = stream + a[i](module.norms[i - 1](stream), context[i], mask[i])
        return stream - x
    parts = [a[i](x, context[i], mask[i]) for i in range(3)]
    if module.mode == "parallel":
        return parts[0] + parts[1] + parts[2]
    combine, everything = reference(module.combine), torch.ones(len(x), 3, dtype=torch.bool)
    rows = [combine(x[:, i : i + 1], torch.stack([p[:, i] for p in parts], 1), everything) for i in range(x.shape[1])]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_equation(mode):
    (x, context, mask), module = inputs(), build(mode)
    wanted = expected(module, x, context, mask)
    torch.testing.assert_close(module(x, context, mask=mask).output, wanted)
    result = module(x, context, mask=mask, need_weights=True)
    torch.testing.assert_close(result.output, wanted)
    total = 1.0 if mode in ("flat", "hierarchical") else 3.0
    torch.testing.assert_close(result.weights.sum(-1), torch.full((2, 3, 4), total).double())
    torch.testing.assert_close(result.weights[1][..., ~torch.cat(mask, 1)[1]], torch.zeros(3, 4, 6).double())


@torch.no_grad()
def test_one_query_by_loops():
    """Flat, without any attention module: one query, one head at a time."""
    (x, context, _), module = inputs(1), build("flat")
    heads, keys = module.attention[0], torch.cat(context, 1)[0]
    mixed = torch.zeros(12, dtype=torch.float64)
    for h in range(3):
        rows = slice(4 * h, 4 * h + 4)
        q = heads.q_proj.weight[rows] @ x[0, 0]
        score = [(q @ (heads.k_proj.weight[rows] @ s) / 2).exp() for s in keys]
        for part, source in zip(score, keys, strict=True):
            mixed[rows] += part / sum(score) * (heads.v_proj.weight[rows] @ source)
    torch.testing.assert_close(module(x, context).output[0, 0], heads.o_proj.weight @ mixed)


@torch.no_grad()
def test_hierarchical_weights_are_the_levels_multiplied():
    (x, context, _), module = inputs(), build("hierarchical")
    module.combine.q_proj.weight.zero_()  # all sources alike
    weights = module(x, context, need_weights=True).weights
    shares = torch.stack([part.sum(-1) for part in weights.split([5, 3, 20], -1)], -1)
    torch.testing.assert_close(shares, torch.full((2, 3, 4, 3), 1 / 3).double())


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_contexts_are_read_once(mode):
    (x, context, mask), module = inputs(), build(mode, causal=True)
    wanted, state = module(x, context, mask=mask).output, module.init_state(2)
    first = module(x[:, :1], context, mask=mask, state=state).output
    ignored = tuple(torch.zeros_like(part) for part in context)
    rest = module(x[:, 1:], ignored, mask=mask, state=state).output
    torch.testing.assert_close(torch.cat([first, rest], 1), wanted)
    with pytest.raises(ValueError, match="start a new state"):
        module(x, (context[0], context[1], context[2][:, :4]), state=state)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_source_without_tokens_gives_nothing(mode):
    (x, context, mask), module = inputs(), build(mode)
    empty = (mask[0], torch.zeros_like(mask[1]), mask[2])
    other = (context[0], context[1] + 1.0, context[2])
    found = module(x, context, mask=empty).output
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, module(x, other, mask=empty).output)


@torch.no_grad()
def test_hierarchical_leaves_out_a_source_without_tokens():
    (x, context, mask), module = inputs(), build("hierarchical")
    empty = (mask[0], torch.zeros_like(mask[1]), mask[2])
    parts = torch.stack([reference(module.attention[i])(x, context[i], mask[i]) for i in (0, 2)], 2)
    combine, everything = reference(module.combine), torch.ones(2, 2, dtype=torch.bool)
    wanted = torch.cat([combine(x[:, i : i + 1], parts[:, i], everything) for i in range(4)], 1)
    torch.testing.assert_close(module(x, context, mask=empty).output, wanted)


def test_refusals():
    with pytest.raises(ValueError, match="mode='sum'"):
        build("sum")
    with pytest.raises(ValueError, match="sources=1"):
        MultiSource(12, 3, sources=1)
    (x, context, _), module = inputs(), build("serial")
    with pytest.raises(ValueError, match="3 wanted"):
        module(x, context[:2])
