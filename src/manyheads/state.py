"""What a mechanism remembers between passes, so that decoding equals one parallel pass."""

from __future__ import annotations

import torch
from torch import Tensor


def _time(tensor: Tensor) -> int:
    """The axis that grows: the last of [batch, time], else the one before the last of [..., time, features]."""
    return 1 if tensor.ndim == 2 else tensor.ndim - 2


class Buffer:
    """Rows over time in one preallocated tensor that grows by half; the oldest rows can be dropped."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data: Tensor | None = None
        self.start = 0
        self.stop = 0
        self.added = 0  # rows ever appended, those dropped since among them

    def __len__(self) -> int:
        return self.stop - self.start

    def view(self) -> Tensor:
        assert self.data is not None
        return self.data.narrow(_time(self.data), self.start, len(self))

    def append(self, new: Tensor) -> Tensor:
        """Adds rows and returns all that are held, as a view."""
        axis, added = _time(new), new.shape[_time(new)]
        self.added += added
        if new.requires_grad and torch.is_grad_enabled():
            # Writing in place would break the backward of the earlier passes.
            self.data = new if self.data is None else torch.cat([self.view(), new], axis)
            self.start, self.stop = 0, self.data.shape[axis]
            return self.data
        self._reserve(new, added)
        assert self.data is not None
        self.data.narrow(axis, self.stop, added).copy_(new)
        self.stop += added
        return self.view()

    def _reserve(self, like: Tensor, added: int) -> None:
        axis, need = _time(like), len(self) + added
        room = 0 if self.data is None else self.data.shape[axis]
        if self.stop + added <= room:
            return
        # Rows dropped at the front make room again once they are half of the buffer: each row is moved once or twice.
        if need * 2 > room:
            shape = list(like.shape)
            shape[axis] = max(self.capacity, need if room == 0 else need + need // 2)
            fresh = like.new_empty(shape)
        else:
            assert self.data is not None
            fresh = self.data
        if self.data is not None and len(self):
            fresh.narrow(axis, 0, len(self)).copy_(self.view())
        self.data, self.start, self.stop = fresh, 0, len(self)

    def keep_last(self, rows: int) -> None:
        """Drops older rows; gives memory back where a long pass took much more than is kept."""
        self.start = max(self.start, self.stop - rows)
        if self.data is None:
            return
        axis, enough = _time(self.data), max(self.capacity, 2 * len(self))
        if self.data.shape[axis] > 2 * enough:
            shape = list(self.data.shape)
            shape[axis] = enough
            fresh = self.data.new_empty(shape)
            fresh.narrow(axis, 0, len(self)).copy_(self.view())
            self.data, self.start, self.stop = fresh, 0, len(self)


class State:
    """The memory of one mechanism for one batch; made by `Mechanism.init_state`, filled by its passes.

    length: tokens seen. grown: buffers with a row per token. fixed: tensors of constant size, replaced at every pass
    (recurrences). context: what was computed once from the context of cross attention.
    """

    def __init__(self, owner: str, batch: int, *, capacity: int = 0) -> None:
        self.owner = owner
        self.batch = batch
        self.capacity = capacity
        self.length = 0
        self.grown: dict[str, Buffer] = {}
        self.fixed: dict[str, Tensor] = {}
        self.context: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held, with what is allocated ahead."""
        tensors = [b.data for b in self.grown.values() if b.data is not None]
        tensors += [*self.fixed.values(), *self.context.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def append(self, name: str, new: Tensor) -> Tensor:
        """Adds rows to the buffer `name` and returns all rows held: [..., m, features] or [batch, m]."""
        return self.grown.setdefault(name, Buffer(self.capacity)).append(new)

    def append_optional(self, name: str, new: Tensor | None, default: Tensor) -> Tensor | None:
        """Like append, but nothing is held until the first pass that gives a value; earlier rows are `default`.

        default: [1, length + n], what each of the tokens seen would have had.
        """
        if new is None and name not in self.grown:
            return None
        seen = default.shape[1]
        if name not in self.grown and self.length:
            # As far back as the longest buffer reaches without this pass: behind a window nothing is asked for.
            before = (len(b) - max(b.added - self.length, 0) for b in self.grown.values())
            held = max(before, default=self.length)
            self.append(name, default[:, self.length - held : self.length].expand(self.batch, -1))
            self.grown[name].added = self.length
        fresh = default[:, self.length : seen] if new is None else new
        return self.append(name, fresh.expand(self.batch, -1))

    def advance(self, tokens: int, span: int | None = None) -> None:
        """Ends a pass over `tokens` new ones. With a span, only what the next token can look back to is kept."""
        self.length += tokens
        if span is not None:
            for buffer in self.grown.values():
                buffer.keep_last(span - 1)

    def reorder(self, index: Tensor) -> None:
        """Row r becomes what row index[r] was; index may repeat or leave out rows (beams, selection)."""
        for buffer in self.grown.values():
            if buffer.data is not None:
                buffer.data = buffer.data.index_select(0, index.to(buffer.data.device))
        for tensors in (self.fixed, self.context):
            for name, tensor in tensors.items():
                tensors[name] = tensor.index_select(0, index.to(tensor.device))
        self.batch = index.shape[0]

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on. Raises ValueError for a recurrence or a window that has moved on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"{self.owner}: cannot truncate a state of {self.length} tokens to {length}")
        if length == self.length:
            return
        if self.fixed:
            raise ValueError(
                f"{self.owner}: its state is a running summary ({', '.join(self.fixed)}) that cannot be truncated; "
                "keep a copy (copy.deepcopy) before the tokens you may want to take back"
            )
        gone = self.length - length
        for name, buffer in self.grown.items():
            if len(buffer) < self.length:
                raise ValueError(
                    f"{self.owner}: {name} of {self.length - len(buffer)} tokens were dropped behind its window; a "
                    "state that has dropped tokens cannot be truncated"
                )
        for buffer in self.grown.values():
            buffer.stop -= gone
            buffer.added -= gone
        self.length = length
