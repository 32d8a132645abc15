"""Focus-DETR's scores and dual attention, cell by cell."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.grid.focus_detr import FocusDETR


def build(**config):
    torch.manual_seed(0)
    return FocusDETR(12, 3, **{"levels": 2, "objects": 4, "classes": 3, **config}).double()


def predict(p, z):
    h = [F.gelu(p.read(p.norm(row))) for row in z]
    mean = sum(row[6:] for row in h) / len(h)
    rows = [F.gelu(p.to_half(torch.cat([row[:6], mean]))) for row in h]
    return torch.stack([p.to_score(F.gelu(p.to_quarter(row)))[0] for row in rows])


@torch.no_grad()
def test_equation():
    module, fine, coarse = build(), torch.randn(2, 4, 3, 12).double(), torch.randn(2, 2, 2, 12).double()
    places = torch.randn(2, 16, 12).double()
    output = module((fine, coarse), places=places).output
    assert len(output) == 6
    x = torch.cat([fine[1].flatten(0, 1), coarse[1].flatten(0, 1)])
    memory = module.memory_norm(module.memory(x + places[1]))
    low = predict(module.predictor, memory[12:])
    up = torch.stack([_bilinear(low.view(2, 2), i / 3, j / 2) for i in range(4) for j in range(3)])
    high = predict(module.predictor, memory[:12] + module.alpha[0] * up[:, None] * memory[:12])
    scores = torch.cat([high, low])
    found = torch.cat([output[2][1].flatten(), output[3][1].flatten()])
    torch.testing.assert_close(found, scores)
    kept = scores.argsort(descending=True)[:9]
    value = module.classes(x).amax(-1) * scores
    chosen = [int(i) for i in value.argsort(descending=True) if i in kept][:4]
    rows, a = [], module.attention
    for i in chosen:
        parts = []
        for h in range(3):
            cut = slice(4 * h, 4 * h + 4)
            q = a.q_proj(x[i] + places[1, i])[cut]
            weights = torch.stack([q @ a.k_proj(x[j] + places[1, j])[cut] / 2 for j in chosen]).softmax(0)
            parts.append(sum(w * a.v_proj(x[j])[cut] for w, j in zip(weights, chosen, strict=True)))
        rows.append(module.norm(x[i] + a.o_proj(torch.cat(parts))))
    wanted = x.clone()
    wanted[chosen] = torch.stack(rows)
    torch.testing.assert_close(torch.cat([output[0][1].flatten(0, 1), output[1][1].flatten(0, 1)]), wanted)


def _bilinear(grid, i, j):
    """Of a 2 x 2 grid at a place from 0 to 1, corners on corners."""
    return (1 - i) * ((1 - j) * grid[0, 0] + j * grid[0, 1]) + i * ((1 - j) * grid[1, 0] + j * grid[1, 1])


@torch.no_grad()
def test_padded_cells_are_never_kept_and_in_no_mean():
    module, x = build(levels=1, objects=300), torch.randn(1, 4, 4, 12).double()
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, 3] = False
    padded, cut = module((x,), mask=(mask,)).output, module((x[:, :3],)).output
    for one, other in zip(padded, cut, strict=True):
        torch.testing.assert_close(one[:, :3], other)


def test_alpha_and_classes_learn_through_what_is_given_back():
    module = build()
    output = module((torch.randn(1, 4, 4, 12).double(), torch.randn(1, 2, 2, 12).double())).output
    sum(part.square().mean() for part in output[2:]).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in (module.alpha, module.classes.weight, module.memory.weight))


def test_refusals():
    for wrong in ({"ratio": 0.0}, {"objects": 0}, {"levels": 0}):
        with pytest.raises(ValueError, match="focus-detr: dim"):
            build(**wrong)
    with pytest.raises(ValueError, match="dim=6"):
        FocusDETR(6, 3)
    x = torch.randn(1, 2, 2, 12).double()
    with pytest.raises(ValueError, match="places are"):
        build(levels=1)((x,), places=torch.zeros(1, 3, 12))
