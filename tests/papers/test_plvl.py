"""The language-guided block against a dense computation with the bias of every pair of cells."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.plvl import PLVL


def build(**config):
    torch.manual_seed(0)
    module = PLVL(12, 3, **{"side": 4, "adapter": 5, **config}).double().eval()
    with torch.no_grad():
        for table in (module.rows, module.columns):
            if table is not None:
                table.normal_()
    return module


def resized(table, size):
    return F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T


def see(module, x):
    """x [h, w, e], normed"""
    height, width, _ = x.shape
    rows, columns = (
        (None, None) if module.rows is None else (resized(module.rows, height), resized(module.columns, width))
    )
    part, cells = module.attention, [(i, j) for i in range(height) for j in range(width)]
    mixed = torch.zeros_like(x)
    for i, j in cells:
        for h in range(3):
            cut = slice(4 * h, 4 * h + 4)
            q, scores = part.q_proj(x[i, j])[cut], []
            for r, c in cells:
                score = q @ part.k_proj(x[r, c])[cut] / 2
                if rows is not None:
                    score = score + q @ rows[i - r + height - 1] + q @ columns[j - c + width - 1]
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            mixed[i, j, cut] = sum(w * part.v_proj(x[p])[cut] for w, p in zip(weights, cells, strict=True))
    return part.o_proj(mixed)


def by_cells(module, x, words):
    x = x + see(module, module.norm(x))
    n = module.norm_words(words)
    t, part = n + module.up(F.relu(module.down(n))), module.cross
    wide = 12 // part.heads
    q, k, v = (
        p(s).unflatten(-1, (part.heads, wide)) for p, s in ((part.q_proj, x), (part.k_proj, t), (part.v_proj, t))
    )
    weights = torch.softmax(torch.einsum("ijhd,mhd->ijhm", q, k) / wide**0.5, -1)
    x = x + part.o_proj(torch.einsum("ijhm,mhd->ijhd", weights, v).flatten(2))
    return x + module.narrow(F.gelu(module.wide(module.norm_mlp(x))))


@pytest.mark.parametrize(
    ("config", "size"), [({}, (4, 4)), ({}, (3, 5)), ({"side": 0}, (2, 3)), ({"cross_heads": 2}, (3, 2))]
)
@torch.no_grad()
def test_equation(config, size):
    module, x, words = build(**config), torch.randn(2, *size, 12).double(), torch.randn(2, 5, 12).double()
    torch.testing.assert_close(module(x, words).output[1], by_cells(module, x[1], words[1]))
    short = torch.arange(5).expand(2, 5) < 3
    torch.testing.assert_close(module(x, words, mask=short).output[1], by_cells(module, x[1], words[1, :3]))


@torch.no_grad()
def test_no_matrix_of_cells_is_made():
    module, x = build(), torch.randn(1, 40, 40, 12).double()
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        module(x, x[:, 0, :5])
    assert max(made) < 1600 * 1600


def test_refusals():
    with pytest.raises(ValueError, match=r"cross_heads=5"):
        build(cross_heads=5)
    with pytest.raises(ValueError, match="context is missing"):
        build()(torch.zeros(1, 2, 2, 12).double())
