"""ConDaFormer's block against loops over occupied cells."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.condaformer import ConDaFormer

SIZES = (4, 3, 5)


def build(**config):
    torch.manual_seed(0)
    module = ConDaFormer(12, 6, **{"window": 3, **config}).double().eval()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return module


def batch_norm(layer, x):
    return (x - layer.running_mean) / (layer.running_var + 1e-5) ** 0.5 * layer.weight + layer.bias


def structure(part, x, cells):
    """x: what each cell holds, by its place."""
    y = {}
    for c in cells:
        total = torch.zeros(12).double()
        for a in range(3):
            for b in range(3):
                for d in range(3):
                    near = (c[0] + a - 1, c[1] + b - 1, c[2] + d - 1)
                    if near in x:
                        total = total + part.conv.weight[:, 0, a, b, d] * x[near]
        around = part.around(F.gelu(batch_norm(part.norm_conv, total)))
        y[c] = torch.cat([batch_norm(part.norm_alone, part.alone(x[c])), batch_norm(part.norm_around, around)])
    return y


def attended(module, z, cells):
    first = [min(c[axis] for c in cells) for axis in range(3)]
    half = module.window // 2 if module.shift else 0
    y = {c: torch.zeros(12).double() for c in cells}
    for h in range(6):
        cut, third = slice(2 * h, 2 * h + 2), h // 2
        flat = (2, 1, 0)[third]

        def window(c, flat=flat):
            return tuple(c[a] if a == flat else (c[a] - first[a] + half) // module.window for a in range(3))

        for i in cells:
            q = module.q_proj(z[i])[cut] / 2**0.5
            scores, values = [], []
            for j in cells:
                if window(i) != window(j):
                    continue
                k, v = module.k_proj(z[j])[cut], module.v_proj(z[j])[cut]
                score = q @ k
                for a in range(3):
                    row = (i[a] - j[a]) * module.steps + module.window * module.steps - 1
                    score = score + q @ module.query_table[row, a, h % 2] + k @ module.key_table[row, a, h % 2]
                    v = v + module.value_table[row, a, h % 2]
                scores.append(score)
                values.append(v)
            y[i][cut] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return y


@pytest.mark.parametrize(("shift", "steps"), [(False, 1), (True, 1), (True, 4)])
@torch.no_grad()
def test_block(shift, steps):
    module, x = build(shift=shift, steps=steps), torch.randn(1, *SIZES, 12).double()
    for table in (module.query_table, module.key_table, module.value_table):
        table.normal_()
    occupied = torch.rand(1, *SIZES, generator=torch.Generator().manual_seed(1)) < 0.4
    occupied[:, 0] = False
    cells = [tuple(c) for c in occupied[0].nonzero().tolist()]
    given = {c: x[(0, *c)] for c in cells}
    z = {c: F.layer_norm(v, (12,), eps=1e-6) for c, v in given.items()}
    o = attended(module, structure(module.before, z, cells), cells)
    o = structure(module.after, o, cells)
    found = module(x, mask=occupied).output
    for c in cells:
        y = given[c] + module.o_proj(o[c])
        y = y + module.mlp.down(F.gelu(module.mlp.up(F.layer_norm(y, (12,), eps=1e-6))))
        torch.testing.assert_close(found[(0, *c)], y)


@torch.no_grad()
def test_a_third_of_the_heads_for_each_plane():
    module, x = build(), torch.randn(1, *SIZES, 12).double()
    weights = module(x, need_weights=True).weights.view(6, *SIZES, *SIZES)
    torch.testing.assert_close(weights.flatten(4).sum(-1), torch.ones(6, *SIZES).double())
    own = weights[:, 1, 1, 1]
    torch.testing.assert_close(own[:2, :3, :3, 1].sum((1, 2)), torch.ones(2).double())
    torch.testing.assert_close(own[2:4, :3, 1, :3].sum((1, 2)), torch.ones(2).double())
    torch.testing.assert_close(own[4:, 1, :3, :3].sum((1, 2)), torch.ones(2).double())


def test_statistics_are_of_occupied_cells():
    module, x = build().train(), torch.randn(2, *SIZES, 12).double()
    occupied = torch.rand(2, *SIZES, generator=torch.Generator().manual_seed(1)) < 0.5
    one = module(x.masked_fill(~occupied[..., None], 5.0), mask=occupied).output
    module = build().train()
    other = module(x.masked_fill(~occupied[..., None], -9.0), mask=occupied).output
    torch.testing.assert_close(one[occupied], other[occupied])


def test_refusals():
    with pytest.raises(ValueError, match="divisible by 3"):
        ConDaFormer(12, 4)
    with pytest.raises(ValueError, match="window=0"):
        build(window=0)
