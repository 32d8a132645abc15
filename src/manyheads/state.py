"""What a mechanism remembers between passes, so that decoding equals one parallel pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.finite import NEVER, first_of


def _time(tensor: Tensor) -> int:
    """The axis that grows: the last of [batch, time], else the one before the last of [..., time, features]."""
    return 1 if tensor.ndim == 2 else tensor.ndim - 2


class Buffer:
    """Rows over time in one preallocated tensor that grows by half; the oldest rows can be dropped. own: nobody else
    reads the tensor, so that rows may be written into it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data: Tensor | None = None
        self.start = 0
        self.stop = 0
        self.added = 0  # rows ever appended, those dropped since among them
        self.own = True

    def __len__(self) -> int:
        return self.stop - self.start

    def view(self) -> Tensor:
        assert self.data is not None
        return self.data.narrow(_time(self.data), self.start, len(self))

    def append(self, new: Tensor, *, read_again: bool = False) -> Tensor:
        """Adds rows and returns all that are held, as a view. read_again: a backward pass will read them."""
        axis, added = _time(new), new.shape[_time(new)]
        self.added += added
        if (new.requires_grad or read_again) and torch.is_grad_enabled():
            # Writing in place would break the backward of the earlier passes.
            self.data = new if self.data is None else torch.cat([self.view().to(new), new], axis)
            self.start, self.stop, self.own = 0, self.data.shape[axis], False
            return self.data
        self._reserve(new, added)
        assert self.data is not None
        self.data.narrow(axis, self.stop, added).copy_(new)
        self.stop += added
        return self.view()

    def _reserve(self, like: Tensor, added: int) -> None:
        axis, need = _time(like), len(self) + added
        room = 0 if self.data is None else self.data.shape[axis]
        # Whether there was room must not say in which dtype rows are held: the new ones say it.
        fits = self.data is not None and self.own and (self.data.dtype, self.data.device) == (like.dtype, like.device)
        if fits and self.stop + added <= room:
            return
        # Rows dropped at the front make room again once they are half of the buffer: each row is moved once or twice.
        if self.data is None or not fits or need * 2 > room:
            shape = list(like.shape)
            shape[axis] = max(self.capacity, need if room == 0 else need + need // 2)
            fresh = like.new_empty(shape)
        else:
            fresh = self.data
        if self.data is not None and len(self):
            fresh.narrow(axis, 0, len(self)).copy_(self.view())
        self.data, self.start, self.stop, self.own = fresh, 0, len(self), True

    def keep_last(self, rows: int) -> None:
        """Drops older rows; gives memory back where a long pass took much more than is kept."""
        self.start = max(self.start, self.stop - rows)
        if self.data is None:
            return
        axis, enough = _time(self.data), max(self.capacity, 2 * len(self))
        if self.data.shape[axis] > enough:
            shape = list(self.data.shape)
            shape[axis] = enough
            fresh = self.data.new_empty(shape)
            fresh.narrow(axis, 0, len(self)).copy_(self.view())
            self.data, self.start, self.stop = fresh, 0, len(self)


def _marks(hidden: Tensor, start: int) -> Tensor:
    """A number per row [batch] that says which tokens, counted from `start`, are hidden [batch, n]: a sum of scrambled
    places, so that it is added to as tokens come and takes no room for those that have been. 0 = none."""
    place = torch.arange(start + 1, start + 1 + hidden.shape[1], device=hidden.device)
    place = place * -7046029254386353131
    place = (place ^ (place >> 31)) * -4658895280553007687
    return torch.where(hidden, place ^ (place >> 29), 0).sum(1)


def hidden_first(real: Tensor) -> bool:
    """No token [batch, n] is hidden behind a real one."""
    return not bool((real[:, :-1] & ~real[:, 1:]).any())


class State:
    """The memory of one mechanism for one batch; made by `Mechanism.init_state`, filled by its passes.

    length: tokens seen. grown: buffers with a row per token. fixed: tensors of constant size, replaced at every pass
    (recurrences). context: what was computed once from the context of cross attention. places: [batch, held], which
    token each row of the buffers is, where that is not their order (see `tell`). broken: [batch], the place of the
    first token that held NaN or infinity, from which on all is NaN; None where no pass had any. config: that of the
    module it was made for. keeper: keeps the keys and values itself, and attends to them in the mechanism's place:
    keeper(q, k, v, padding, dense), new keys and values only, as in SoftmaxAttention; None as a rule. A copy, shallow
    or deep, has rows of its own: in shared ones each would write over what the other appended.
    """

    def __init__(self, owner: str, batch: int, *, capacity: int = 0, config: Mapping[str, Any] | None = None) -> None:
        self.owner = owner
        self.batch = batch
        self.capacity = capacity
        self.config = config
        self.length = 0
        self.grown: dict[str, Buffer] = {}
        self.fixed: dict[str, Tensor] = {}
        self.context: dict[str, Tensor] = {}
        self.places: Tensor | None = None
        self.broken: Tensor | None = None
        self.keeper: Any = None
        self._unread: Tensor | None = None  # rows with hidden tokens that held no numbers
        self._optional: set[str] = set()
        self._blends: set[str] = set()
        self._told: Tensor | None = None  # marks of the tokens hidden so far, None where none ever was
        self._read_again = False  # a backward pass will read what is appended

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        other = memo[id(self)] = State(self.owner, self.batch)
        for tensor in self._tensors():
            if not tensor.is_leaf:  # of a graph, which goes on through the copy
                memo[id(tensor)] = tensor.clone()
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __copy__(self) -> State:
        return copy.deepcopy(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held, with what is allocated ahead."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        return sum(storages.values())

    def _tensors(self) -> list[Tensor]:
        grown = [buffer.data for buffer in self.grown.values()]
        known = (self.places, self._told, self.broken, self._unread)  # of each row, beside what its mechanism remembers
        return [t for t in (*grown, *self.fixed.values(), *self.context.values(), *known) if t is not None]

    def kinds(self) -> list[str]:
        """In which dtypes and where it holds numbers, in words."""
        return sorted({f"{t.dtype} on {t.device}" for t in self._tensors() if t.is_floating_point()})

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Every tensor becomes what `change` makes of it; where that breaks off, none has."""

        def changed(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}

        grown = changed({name: buffer.data for name, buffer in self.grown.items()})
        fixed, context = changed(self.fixed), changed(self.context)
        rows = changed({name: getattr(self, name) for name in ("places", "_told", "broken", "_unread")})
        for name, data in grown.items():
            self.grown[name].data = data
        self.fixed, self.context = fixed, context
        vars(self).update(rows)

    def begin(self, read_again: bool) -> None:
        """Before a pass. read_again: a backward pass will read what it appends. What earlier ones left of inference
        mode, where that has ended, can be neither written nor read by a backward pass: copies can."""
        self._read_again = read_again
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(tensor.is_inference() for tensor in self._tensors()):
            self._replace(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def keep(self) -> Callable[[], None]:
        """What puts the state back as it is now, should the pass that follows break off. Costs no copy of a tensor:
        passes replace what is fixed, and write behind the rows that a buffer holds."""
        kept = vars(self).copy()
        for name, value in kept.items():
            if isinstance(value, (dict, set)):
                kept[name] = value.copy()
        kept["grown"] = {name: copy.copy(buffer) for name, buffer in self.grown.items()}

        def restore() -> None:
            vars(self).clear()
            vars(self).update(kept)

        return restore

    def mark_broken(self, real: Tensor, hidden: Tensor, seen: int) -> None:
        """After a pass from the token `seen` on: which tokens [batch, n] held no numbers, read or hidden."""
        first, unread = first_of(real, seen), hidden.any(1)
        self.broken = first if self.broken is None else torch.minimum(first, self.broken)
        self._unread = unread if self._unread is None else unread | self._unread

    def append(self, name: str, new: Tensor, *, blends: bool = False) -> Tensor:
        """Adds rows to the buffer `name` and returns all rows held: [..., m, features] or [batch, m]. blends: a row
        holds something of the tokens before its own, so that these cannot be hidden or shown afterwards."""
        if blends:
            self._blends.add(name)
        return self.grown.setdefault(name, Buffer(self.capacity)).append(new, read_again=self._read_again)

    def append_optional(self, name: str, new: Tensor | None, default: Tensor) -> Tensor | None:
        """Like append, but nothing is held until the first pass that gives a value; earlier rows are `default`.

        default: [1, length + n], what each of the tokens seen would have had.
        """
        self._optional.add(name)
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
        """Row r becomes what row index[r] was; index [rows], integers, may repeat or leave out rows (beams,
        selection). ValueError for another index; one that does not come through leaves all as it was."""
        self._check_rows(index)
        self._replace(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        self.batch = index.shape[0]

    def _check_rows(self, index: Tensor) -> None:
        right = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.ndim == 1
        if right and index.device.type == "cpu":  # elsewhere the question would stop the queue
            right = len(index) > 0 and int(index.min()) >= 0 and int(index.max()) < self.batch
        if not right or index.is_meta:
            raise ValueError(
                f"{self.owner}: cannot reorder the rows of a state for batch {self.batch} by {str(index)[:80]}; want a "
                f"tensor of integers from 0 to {self.batch - 1}, one for each new row"
            )

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on. Raises ValueError for a recurrence or a window that has moved on."""
        if isinstance(length, bool) or not isinstance(length, int):
            raise ValueError(f"{self.owner}: cannot truncate to {length!r} tokens; want an integer")
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
        if self.places is not None:
            self._sort(self.places.argsort(1))
        for buffer in self.grown.values():
            buffer.stop -= gone
            buffer.added -= gone
        self.length = length
        if self.broken is not None:
            self.broken = self.broken.masked_fill(self.broken >= length, NEVER)
        if "padding" in self.grown:
            real = self.grown["padding"].view()
            self._told = _marks(~real, 0)
            self._arrange(real)
        elif self._told is not None:
            self._told = torch.full_like(self._told, -1)  # which of the hidden tokens are left is not known

    # -- a mask over what has been seen ----------------------------------------------------------------------------

    def note(self, padding: Tensor | None, seen: int) -> None:
        """After a pass over the tokens from `seen` on: what was hidden of them. padding: [batch, n], True = real."""
        if padding is not None:
            marks = _marks(~padding, seen)
            self._told = marks if self._told is None else self._told + marks
        if self.places is not None:
            held = max(len(buffer) for buffer in self.grown.values())
            self.places = self._with_new(self.places, self.length - seen)[:, -held:]

    def _with_new(self, places: Tensor, n: int) -> Tensor:
        first = int(places.max()) + 1
        return torch.cat([places, torch.arange(first, first + n, device=places.device).expand(self.batch, -1)], 1)

    def tell(self, real: Tensor) -> None:
        """From now on those of the tokens seen are real that are in `real`, [batch, length].

        Rows of tokens with a remembered padding obey: those of hidden tokens are moved before all others, as if they
        had been padding on the left, so that windows and blocks count real tokens only. Raises ValueError where that
        changes what the state cannot take back.
        """
        why = self.obstacle(real)
        if why:
            raise ValueError(why)
        if self.agrees(real) and (hidden_first(self._stored(real)) or self._stiff(real)):
            return
        self._arrange(real)
        self._told = _marks(~real, 0)

    def as_stored(self, columns: Tensor) -> Tensor:
        """Before a pass: [..., length + n] in the order of the tokens -> in that of the buffers."""
        if self.places is None:
            return columns
        order = torch.arange(columns.shape[-1], device=columns.device).repeat(self.batch, 1)
        order[:, self.length - self.places.shape[1] : self.length] = self.places
        return columns.gather(-1, order[:, None, None].expand_as(columns))

    def as_fed(self, columns: Tensor, places: Tensor | None) -> Tensor:
        """Of a pass that began with these places: [..., m] in the order of the buffers -> in that of the tokens."""
        if places is None:
            return columns
        n = self.length - int(places.max()) - 1
        order = self._with_new(places, n)[:, -columns.shape[-1] :]
        first = int(order.min())
        natural = columns.new_zeros(*columns.shape[:-1], self.length - first)
        return natural.scatter(-1, (order - first)[:, None, None].expand_as(columns), columns)

    def obstacle(self, real: Tensor) -> str | None:
        """Why `tell` would refuse, None where it would not."""
        if self.agrees(real):
            return None
        why = self._stiff(real)
        return why and (
            f"{self.owner}: the mask hides or shows other tokens among the {self.length} of earlier passes than it did "
            f"when they were fed, and the state {why}; start a new state (a new cache) and feed the conversation "
            "again, with what is hidden as padding on the left"
        )

    def agrees(self, real: Tensor) -> bool:
        """The tokens in `real`, [batch, length], are those that were real when they were fed, or last told."""
        return bool((real if self._told is None else _marks(~real, 0) == self._told).all())

    def _stiff(self, real: Tensor) -> str | None:
        if self._unread is not None and bool(self._unread.any()):
            return "has not read hidden tokens that held NaN or infinity"
        if self.fixed:
            return f"is a running summary ({', '.join(self.fixed)})"
        if self._blends:
            return f"holds rows ({', '.join(sorted(self._blends))}) that blend several tokens"
        if "padding" not in self._optional:
            return "remembers no padding beside its tokens"
        if len({len(buffer) for buffer in self.grown.values()}) > 1:
            return "holds more than a row for each token"
        stored, held = self._stored(real), self._places(real).shape[1]
        # How many real tokens there are from each place on: the rows held must be the last ones, and full, or all.
        left = real.flip(1).cumsum(1).flip(1).gather(1, self._places(real))
        last = stored.all(1) & (left.max(1).values == held)
        if not bool((last | (stored.sum(1) == real.sum(1))).all()):
            return f"has dropped {self.length - held} tokens behind its window, of which the next would see more"
        return None

    def _places(self, like: Tensor) -> Tensor:
        if self.places is not None:
            return self.places
        held = max((len(buffer) for buffer in self.grown.values()), default=0)
        return torch.arange(self.length - held, self.length, device=like.device).expand(self.batch, -1)

    def _stored(self, real: Tensor) -> Tensor:
        return real.gather(1, self._places(real))

    def _arrange(self, real: Tensor) -> None:
        """Puts rows in order, hidden ones first, and remembers which are real."""
        if "positions" in self._optional and "positions" not in self.grown:
            self.grown["positions"] = self._filled(self._places(real).contiguous())
        places, stored = self._places(real), self._stored(real)
        self.grown["padding"] = self._filled(stored)
        self._sort((places + stored * self.length).argsort(1))

    def _filled(self, rows: Tensor) -> Buffer:
        buffer = Buffer(self.capacity)
        buffer.append(rows)
        buffer.added = self.length
        return buffer

    def _sort(self, order: Tensor) -> None:
        """Row r of the buffers becomes what row order[:, r] was. In new tensors: copies of this state share the old."""
        places = self._places(order).gather(1, order)
        for buffer in self.grown.values():
            rows = buffer.view()
            index = order if rows.ndim == 2 else order.view(self.batch, *[1] * (rows.ndim - 3), -1, 1)
            buffer.data, buffer.start, buffer.stop = rows.gather(_time(rows), index.expand_as(rows)), 0, len(buffer)
        usual = torch.arange(self.length - places.shape[1], self.length, device=places.device)
        self.places = None if bool((places == usual).all()) else places
