"""Skim-Attention: weights from the layout alone, and the mask that its largest ones make."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.position.skim import Skim

close = torch.testing.assert_close


def linear(layer: torch.nn.Linear, rows: Tensor) -> Tensor:
    return rows @ layer.weight.T + layer.bias


def shares(q: Tensor, k: Tensor, keys: list[int]) -> dict[int, float]:
    powers = {j: math.exp(float(q @ k[j]) / math.sqrt(len(q))) for j in keys}
    return {j: power / sum(powers.values()) for j, power in powers.items()}


def pages(rows: int, n: int, seed: int = 0) -> Tensor:
    """Boxes on pages of 20 by 20 places."""
    ends = torch.randint(20, (rows, n, 2, 2), generator=torch.Generator().manual_seed(seed)).sort(2).values
    return ends.flatten(2)  # x0, y0, x1, y1


def layout_of(module: Skim, box: list[int]) -> Tensor:
    (across, down, tall, wide), (x0, y0, x1, y1) = module.tables, box
    return across[x0] + across[x1] + down[y0] + down[y1] + tall[y1 - y0] + wide[x1 - x0]


def loops(module: Skim, x: Tensor, boxes: Tensor) -> Tensor:
    """One sequence. With top_k, the largest weights of the layout choose, and the text weighs."""
    n, heads, text = len(x), module.heads, x
    d = module.dim // heads
    layout = torch.stack([layout_of(module, box) for box in boxes.tolist()])
    spread = (layout - layout.mean(1, keepdim=True)) / (layout.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    normed = spread * module.layout_norm.weight + module.layout_norm.bias
    lq, lk, v = linear(module.layout_q_proj, normed), linear(module.layout_k_proj, normed), linear(module.v_proj, text)
    mixed = torch.zeros(n, module.dim, dtype=x.dtype)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            weights = shares(lq[i, part], lk[:, part], list(range(n)))
            if module.top_k is not None:
                best = sorted(weights, key=lambda j: -weights[j])[: module.top_k]
                weights = shares(linear(module.q_proj, text)[i, part], linear(module.k_proj, text)[:, part], best)
            for j, weight in weights.items():
                mixed[i, part] += weight * v[j, part]
    return linear(module.o_proj, mixed)


def _module(top_k: int | None = None) -> Skim:
    torch.manual_seed(0)
    return Skim(16, 4, side_dim=6, places=20, top_k=top_k).double()


@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@torch.no_grad()
def test_equals_loops(top_k: int | None) -> None:
    module, x = _module(top_k), torch.randn(1, 7, 16, dtype=torch.float64)
    boxes = pages(1, 7)
    close(module(x, boxes=boxes).output[0], loops(module, x[0], boxes[0]), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_text_does_not_move_the_weights() -> None:
    module, x = _module(), torch.randn(2, 8, 16, dtype=torch.float64)
    other, boxes = torch.randn(2, 8, 16, dtype=torch.float64), pages(2, 8)
    first, second = (module(t, boxes=boxes, need_weights=True) for t in (x, other))
    close(first.weights, second.weights, rtol=0, atol=0)
    assert float((first.output - second.output).abs().max()) > 1e-3
    moved = module(x, boxes=pages(2, 8, seed=1), need_weights=True)
    assert float((moved.weights - first.weights).abs().max()) > 1e-3


@torch.no_grad()
def test_padding_takes_no_place_among_the_chosen() -> None:
    module, x = _module(top_k=3), torch.randn(1, 8, 16, dtype=torch.float64)
    mask, boxes = torch.arange(8)[None] < 5, pages(1, 8)
    boxes[:, 5:] = -1
    weights = module(x, mask=mask, boxes=boxes, need_weights=True).weights
    assert bool(((weights > 0).sum(-1) == 3).all())
    close(
        module(x, mask=mask, boxes=boxes).output[:, :5],
        module(x[:, :5], boxes=boxes[:, :5]).output,
        rtol=1e-12,
        atol=1e-12,
    )


def test_the_mask_form_trains_the_text_only() -> None:
    module = _module(top_k=2)
    module(torch.randn(2, 6, 16, dtype=torch.float64), boxes=pages(2, 6)).output.sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == name.startswith(("layout", "tables")), name


def test_refusals() -> None:
    with pytest.raises(ValueError, match="side_dim=0, places=1024"):
        Skim(16, 4, side_dim=0)
    module, x, boxes = _module(), torch.randn(1, 4, 16, dtype=torch.float64), pages(1, 4)
    for given, told in (
        (boxes + 15, "boxes go from [0-9]+ to [0-9]+; want x0 <= x1, y0 <= y1, and all of 0 to 19"),
        (boxes.flip(-1), "want x0 <= x1"),
        (boxes[..., :3], r"boxes are torch.int64 \[1, 4, 3\] on cpu; want integers \[1, 4, 4\]"),
        (boxes.double(), "boxes are torch.float64"),
    ):
        with pytest.raises(ValueError, match=told):
            module(x, boxes=given)
    with pytest.raises(ValueError, match="top_k=0"):
        Skim(16, 4, top_k=0)
