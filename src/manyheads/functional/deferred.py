"""When a training pass may change what its module holds: a checkpointed pass is run again in backward, and must find
everything as it was, and change nothing a second time."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor


def recomputing() -> bool:
    """Inside a backward pass, where checkpointing runs forward passes again, whichever way it was asked to."""
    return torch._C._current_graph_task_id() != -1


class _Pass:
    """One pass whose gradient may still come; its graph keeps it alive."""

    def __init__(self, of: Deferred) -> None:
        self.of = of

    def __call__(self, gradient: Tensor) -> None:
        self.of._open.discard(self)
        self.of._blind = False


class Deferred:
    """Says when what earlier passes have gathered may be applied: once no backward can run them again.

        if self.training and self.deferred.due():  apply what is gathered, and empty it
        ...                                        what the pass reads
        if self.training and not recomputing():    gather;  self.deferred.watch(output)

    So several passes before one backward all read the same. What is gathered belongs in persistent buffers: loaded, it
    is due at once. Passes without gradients may be the first half of reentrant checkpointing: what they gather waits
    for a backward, of theirs or of another pass.
    """

    def __init__(self) -> None:
        self._open: WeakSet[_Pass] = WeakSet()
        self._blind = False

    def due(self) -> bool:
        if recomputing():
            self._blind = False
            return False
        return not self._blind and not self._open

    def watch(self, output: Tensor) -> None:
        if recomputing():
            return
        if output.requires_grad:
            one = _Pass(self)
            output.register_hook(one)
            self._open.add(one)
        elif not torch.is_grad_enabled():
            self._blind = True

    def __deepcopy__(self, memo: Any) -> Deferred:
        return Deferred()

    def __reduce__(self) -> Any:
        return Deferred, ()
