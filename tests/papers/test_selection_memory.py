"""What the fast paths of sparse selection hold at once, forward and backward: never a matrix of all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manyheads import create_attention
from manyheads.testing import LargestTensor

N, DIM, HEADS = 2048, 16, 4
SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("neighborhood", {"window": 16}),
    ("neighborhood", {"window": 16, "dilation": 3, "causal": True}),
    ("multi-window", {"windows": [2, 16, 32, 64]}),
    ("multi-scale", {"scales": [1, 3, 16, 1 / 64]}),
    ("routing-transformer", {"clusters": 16, "window": 32, "local_window": 16}),
    ("routing-transformer", {"clusters": 16, "window": 32, "local_window": 16, "causal": True}),
    ("mosa", {"top_k": 32}),
    ("mosa", {"top_k": 32, "causal": True}),
    ("landmark", {"block": 16, "top_k": 2}),
    ("combiner", {"block": 32}),
    ("combiner", {"partition": "logsparse", "causal": True}),
    ("combiner", {"block": 32, "partition": "axial", "causal": True}),
    ("dma", {"window": 32}),
    ("seqboat", {"window": 16}),
    ("seqboat", {"window": 16, "causal": True}),
    ("sdim", {}),
    ("tree-cross", {}),
]


@pytest.mark.parametrize(("name", "config"), SPARSE)
def test_no_square_matrix(name: str, config: dict[str, Any]) -> None:
    module = create_attention(name, DIM, HEADS, **config)
    x = torch.randn(1, N, DIM, requires_grad=True)
    context = torch.randn(1, N, DIM) if name in ("sdim", "tree-cross") else None
    with LargestTensor() as largest:
        module(x, context).output.sum().backward()
    assert largest.size <= N * 1024
