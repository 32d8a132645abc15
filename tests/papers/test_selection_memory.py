"""What the fast paths of sparse selection hold at once, forward and backward: never a matrix of all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads import create_attention

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


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, Tensor):
                self.size = max(self.size, item.untyped_storage().nbytes() // item.element_size())
        return result


@pytest.mark.parametrize(("name", "config"), SPARSE)
def test_no_square_matrix(name: str, config: dict[str, Any]) -> None:
    module = create_attention(name, DIM, HEADS, **config)
    x = torch.randn(1, N, DIM, requires_grad=True)
    context = torch.randn(1, N, DIM) if name in ("sdim", "tree-cross") else None
    with Largest() as largest:
        module(x, context).output.sum().backward()
    assert largest.size <= N * 1024
