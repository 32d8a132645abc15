"""EMOv2's block against loops over windows, and the published number of parameters."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.emov2 import EMOv2


def build(**config):
    torch.manual_seed(0)
    module = EMOv2(12, 4, **{"window": 3, "expansion": 2.0, **config}).double().eval()
    with torch.no_grad():
        module.scale.normal_()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module


def batch_norm(layer, x):
    mean, var = layer.running_mean, layer.running_var
    return (x - mean) / (var + 1e-6) ** 0.5 * layer.weight + layer.bias


def attended(module, z, v, group):
    """z [height, width, 12], v [height, width, wide]; group: which window a cell is in."""
    height, width, _ = z.shape
    cells, y = [(i, j) for i in range(height) for j in range(width)], torch.zeros_like(v)
    each = v.shape[-1] // 4
    for cell in cells:
        others = [c for c in cells if group(*c) == group(*cell)]
        for h in range(4):
            cut, out = slice(3 * h, 3 * h + 3), slice(each * h, each * h + each)
            q = module.qk(z[cell])[:12][cut]
            scores = torch.stack([q @ module.qk(z[c])[12:][cut] / 3**0.5 for c in others])
            weights = scores.softmax(0)
            y[cell][out] = sum(w * v[c][out] for w, c in zip(weights, others, strict=True))
    return y


@pytest.mark.parametrize("operator", ["both", "far", "near", "none"])
@pytest.mark.parametrize(("early", "features", "stride"), [(False, 12, 1), (True, 12, 1), (False, 12, 2), (True, 8, 1)])
@torch.no_grad()
def test_block(operator, early, features, stride):
    module = build(operator=operator, early=early, features=features, stride=stride)
    x = torch.randn(1, 4, 7, 12).double()
    z = batch_norm(module.norm, x) if early else F.layer_norm(x, (12,), eps=1e-6)
    act = F.silu if early else F.gelu
    v = act(module.value(z))[0]
    near = attended(module, z[0], v, lambda i, j: (i // 3, j // 3)) if operator in ("both", "near") else 0
    far = attended(module, z[0], v, lambda i, j: (i % 2, j % 3)) if operator in ("both", "far") else 0
    o = v if operator == "none" else near + far
    local = F.conv2d(o.permute(2, 0, 1)[None], module.conv.weight, stride=stride, padding=2, groups=24)
    local = F.silu(batch_norm(module.norm_conv, local.permute(0, 2, 3, 1)))
    skips = stride == 1 and features == 12
    y = module.scale * module.project(o + local if skips else local)
    result = module(x, need_weights=True)
    torch.testing.assert_close(result.output, x + y if skips else y)
    if operator == "none" or stride == 2:
        assert result.weights is None
    else:
        rows = torch.full((1, 4, 28), 2.0 if operator == "both" else 1.0).double()
        torch.testing.assert_close(result.weights.sum(-1), rows)


@torch.no_grad()
def test_the_whole_map_as_one_window():
    x = torch.randn(2, 4, 5, 12).double()
    near, far = (build(window=0, operator=operator) for operator in ("near", "far"))
    torch.testing.assert_close(near(x).output, far(x).output)
    torch.testing.assert_close(near(x).output, build(window=5, operator="near")(x).output)


@torch.no_grad()
def test_padding_moves_no_window():
    for stride in (1, 2):
        module, x = build(stride=stride), torch.randn(1, 8, 8, 12).double()
        real = torch.zeros(1, 8, 8, dtype=torch.bool)
        real[:, :5, :7] = True
        wanted = module(x[:, :5, :7]).output
        found = module(x, mask=real).output[:, : wanted.shape[1], : wanted.shape[2]]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("depths", "dims", "ratios", "head_dims", "wanted"),
    [
        ((2, 2, 8, 3), (32, 48, 80, 180), (2.0, 2.5, 3.0, 3.5), (16, 16, 20, 20), 1_460_844),
        ((3, 3, 9, 3), (32, 48, 120, 200), (2.0, 2.5, 3.0, 3.5), (16, 16, 20, 20), 2_384_312),
        ((3, 3, 9, 3), (48, 72, 160, 288), (2.0, 3.0, 4.0, 4.0), (16, 24, 32, 32), 5_126_440),
    ],
)
def test_the_published_models_have_as_many_parameters(depths, dims, ratios, head_dims, wanted):
    before = dims[0] // 2
    total = 27 * before + before + 2 * before + 9 * before + 2 * before + before**2  # the stem
    for stage, (depth, dim, ratio, head_dim) in enumerate(zip(depths, dims, ratios, head_dims, strict=True)):
        early = stage < 2
        first = EMOv2(before, 1, features=dim, stride=2, operator="none", expansion=2 * ratio, early=early)
        operator = "none" if early else "both"
        later = EMOv2(dim, dim // head_dim, operator=operator, expansion=ratio, early=early)
        sizes = [sum(p.numel() for p in block.parameters()) for block in (first, later)]
        total, before = total + sizes[0] + (depth - 1) * sizes[1], dim
    assert total + 2 * dims[-1] + dims[-1] * 1000 + 1000 == wanted


def test_refusals():
    for config in ({"kernel": 4}, {"stride": 3}, {"expansion": 1.1}, {"window": -1}, {"operator": "remote"}):
        with pytest.raises(ValueError, match="emov2"):
            build(**config)
