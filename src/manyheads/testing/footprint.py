"""How much a call holds at once, to show that a sparse or linear mechanism holds no matrix of all pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns, views by what they keep alive.

    >>> with LargestTensor() as largest:
    ...     module(torch.randn(1, 2048, 64))
    >>> assert largest.size < 2048 * 2048
    """

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self.size = max(self.size, item.untyped_storage().nbytes() // item.element_size())
        return result
