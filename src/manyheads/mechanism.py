"""The outer contract: what every mechanism takes, gives and refuses."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.card import Card, Pattern
from manyheads.finite import blanked, broken_tokens
from manyheads.inner import Inner, Listener
from manyheads.signature import checked_arguments
from manyheads.state import State

Context = Tensor | Sequence[Tensor]
_NO_LOSSES: Mapping[str, Tensor] = {}
_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_FLOATING = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Result(NamedTuple):
    """output: [batch, n, dim] ([batch, height, width, dim] for a grid, [batch, dim] for a pool). weights: the effective
    [batch, heads, n, m] matrix where asked for. losses: auxiliary losses by name, scalars, unweighted."""

    output: Tensor
    weights: Tensor | None = None
    losses: Mapping[str, Tensor] = _NO_LOSSES


@dataclass(frozen=True)
class Call:
    """One checked call. padding: [batch, m], True = real, of the tokens of this pass (or of the context; a tuple, one
    per source, where the mechanism has several). dense: [batch, 1 or heads, n, m]. positions: [batch or 1, n], given
    or None; `query_positions` fills in the default."""

    pattern: Pattern
    padding: Any = None
    dense: Tensor | None = None
    positions: Tensor | None = None
    state: State | None = None
    need_weights: bool = False

    @property
    def seen(self) -> int:
        """Tokens that the state has seen in earlier passes; it counts on once the pass calls `state.advance`."""
        return 0 if self.state is None else self.state.length

    def query_positions(self, x: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions
        return torch.arange(self.seen, self.seen + x.shape[1], device=x.device)[None]


def _recorded(init: Callable[..., None], shared: Mapping[str, inspect.Parameter]) -> Callable[..., None]:
    """Checks the arguments of the outermost constructor and keeps them as `self.config`: the constructor is the config.

    shared: what every mechanism of a kind takes beside its own arguments, handed to `take_shared`.
    """
    own = inspect.signature(init)
    # A mechanism of another package may end in **kwargs, behind which nothing stands.
    parameters = sorted([*own.parameters.values(), *shared.values()], key=lambda p: p.kind)
    signature = own.replace(parameters=parameters)

    @functools.wraps(init)
    def wrapper(self: Mechanism, *args: Any, **kwargs: Any) -> None:
        if "config" in self.__dict__:
            return init(self, *args, **kwargs)
        name = type(self).card.name
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            takes = list(signature.parameters)[1:]
            raise TypeError(f"{name}: {error}; it takes {takes}") from None
        bound.apply_defaults()
        values = checked_arguments(name, init, dict(list(bound.arguments.items())[1:]))
        beside = self.take_shared({key: values.pop(key) for key in shared})
        config = {k: asdict(v) if is_dataclass(v) else v for k, v in values.items()}  # type: ignore[arg-type]
        self.__dict__["config"] = {**config, **beside}
        return init(self, **values)

    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    return wrapper


def _without_broken_padding(context: Context, padding: Any) -> Context:
    """The context with zeros for padded tokens that hold NaN or infinity."""
    if not isinstance(context, Tensor):
        return tuple(_without_broken_padding(c, p) for c, p in zip(context, padding, strict=True))  # type: ignore[misc]
    broken = broken_tokens(context)
    return context if broken is None else blanked(context, broken & ~padding)


class Mechanism(nn.Module, ABC):
    """A published way to attend. Subclasses are final; they carry a `card` and write `attend`.

    Every constructor takes `dim, heads` and then keywords, `causal` among them, all of them JSON values (or a
    `Rotary`); `config` gives them back.
    """

    card: ClassVar[Card]
    config: dict[str, Any]
    source_dim: int | None = None  # features of a context, where they are not those of x
    sources: int = 1  # how many contexts one call takes; more than one: context and mask are tuples
    listener: Listener | None = None  # is told of every pass what it does inside, and may change its head outputs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recorded(cls.__init__, cls.shared_arguments())  # type: ignore[method-assign]

    @classmethod
    def shared_arguments(cls) -> Mapping[str, inspect.Parameter]:
        """Keywords that every constructor of a kind takes without naming them."""
        return {}

    def take_shared(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keeps these before the constructor runs; returns what of them belongs in the config."""
        return values

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if not any(p.causal == causal for p in self.card.patterns):
            raise ValueError(f"{self.card.name} cannot be built with causal={causal}; it declares {self._declared()}")
        self.dim, self.heads, self.causal = dim, heads, causal

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        mask: Tensor | Sequence[Tensor] | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
        need_weights: bool = False,
    ) -> Result:
        """Attends from x to itself, or to the context.

        x: [batch, n, dim]. context: [batch, m, dim], for cross attention. mask: boolean, True = may attend; [batch, m]
        is key padding (of this pass's tokens, or of the context), [batch, 1 or heads, n, m] is dense (over all keys,
        those in the state too). With a state key padding may be of every token seen, [batch, seen + n]: it hides and
        shows earlier ones from this pass on, or is refused by a state that has summed them up. positions: integers [n]
        or [batch, n], counted on from the state by default. With a state the pass continues where the last one ended;
        a context is then read once. A row with nothing to attend to gives zeros. Raises ValueError for what the
        mechanism does not declare.
        """
        pattern = self._check_inputs(x, context)
        self._check_state(x, state)
        padding, dense = self._check_mask(pattern, x, context, mask, state)
        if positions is not None:
            positions = self._check_positions(x, positions)
        call = Call(pattern, padding, dense, positions, state, need_weights)
        broken = broken_tokens(x)
        if context is not None and padding is not None:
            context = _without_broken_padding(context, padding)
        try:
            if broken is not None or (state is not None and state.broken is not None):
                return self._past_broken(x, context, call, broken)
            return self._pass(x, context, call)
        except RuntimeError as error:
            why = None if torch.compiler.is_compiling() else self._unlike(x, context)
            if why is None:
                raise
            raise ValueError(why) from error

    def _pass(self, x: Tensor, context: Context | None, call: Call) -> Result:
        """Attends; a pass that breaks off leaves the state as it was."""
        state = call.state
        if state is None:
            return self.attend(x, context, call)
        restore = state.keep()
        try:
            return self._continue(x, context, call, state)
        except BaseException:
            restore()
            raise

    def _past_broken(self, x: Tensor, context: Context | None, call: Call, broken: Tensor | None) -> Result:
        """A pass over tokens that hold NaN or infinity (broken, [batch, n]): padding is not read at all, and what is
        read makes NaN of its own place and of those behind it, never of those before."""
        own, state, seen = context is None, call.state, call.seen
        if broken is None:
            broken = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        padding = call.padding if own else None
        if padding is not None and padding.shape[1:] != broken.shape[1:]:
            padding = padding[:, seen:]
        real = broken if padding is None else broken & padding
        if not call.pattern.causal:
            return self._pass(blanked(x, broken & ~real), context, call)
        result = self._pass(blanked(x, broken), context, call)
        reached = real.cumsum(1) > 0
        if state is not None:
            if state.broken is not None:
                reached = reached | (state.broken[:, None] < seen)
            state.mark_broken(real, broken & ~real, seen)
        output = result.output.masked_fill(reached[..., None], torch.nan)
        weights = result.weights
        if weights is not None:
            weights = weights.masked_fill(reached[:, None, :, None], torch.nan)
        losses = {k: torch.where(reached.any(), torch.nan, v) for k, v in result.losses.items()}
        return Result(output, weights, losses)

    def _continue(self, x: Tensor, context: Context | None, call: Call, state: State) -> Result:
        """A pass behind those that the state has seen; told what of them is real from now on, it counts on."""
        own, seen = context is None, state.length
        if own and call.padding is not None and call.padding.shape[1] > x.shape[1]:
            state.tell(call.padding[:, :seen])
            call = replace(call, padding=call.padding[:, seen:])
        if own and call.dense is not None:
            call = replace(call, dense=state.as_stored(call.dense))
        places = state.places
        result = self.attend(x, context, call)
        state.note(call.padding if own else None, seen)
        return result if result.weights is None else result._replace(weights=state.as_fed(result.weights, places))

    @abstractmethod
    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        """The mechanism itself, on inputs that were checked."""

    def offered(self, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, weights: Tensor | None, where: Any) -> Tensor:
        """The head outputs [b, h, n, e] to go on with, of a forward of its own that made mixed = weights v."""
        if self.listener is None or weights is None:
            return mixed
        return self.listener(Inner(q, k, v, mixed, weights, where))

    def init_state(self, batch: int, *, capacity: int = 0) -> State:
        """An empty state. capacity: rows to allocate at once, where the number of tokens is known."""
        if not self.card.decodes or not self.causal:
            why = "it was built with causal=False" if self.card.decodes else self.card.notes or "see its card"
            raise ValueError(f"{self.card.name} cannot decode step by step: {why}")
        for what, value, least in (("batch", batch, 1), ("capacity", capacity, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{self.card.name}: a state has {what}={value!r}; want an integer >= {least}")
        return State(self.card.name, batch, capacity=capacity, config=self.config)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())

    # -- what is refused -------------------------------------------------------------------------------------------

    def _declared(self) -> list[str]:
        return sorted(p.value for p in self.card.patterns)

    def _pattern(self, x: Tensor, context: Context | None) -> Pattern:
        if x.ndim == 4:
            return Pattern.GRID
        if Pattern.POOL in self.card.patterns and context is None:
            return Pattern.POOL
        return Pattern(f"{'causal' if self.causal else 'noncausal'}-{'self' if context is None else 'cross'}")

    def _check_inputs(self, x: Tensor, context: Context | None) -> Pattern:
        name = self.card.name
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: x is a {type(x).__name__}; want a tensor [batch, n, {self.dim}]")
        shape = tuple(x.shape)
        if x.ndim not in (3, 4) or shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"{name}: x has shape {shape} and dtype {x.dtype}; want floating point [batch, n, {self.dim}]"
                + (f" or [batch, height, width, {self.dim}]" if Pattern.GRID in self.card.patterns else "")
            )
        self._check_kind("x", x, x.device)
        if x.is_meta and (why := self._unlike(x, None)):  # what does not look at x would make numbers of nothing
            raise ValueError(why)
        if 0 in shape:
            raise ValueError(f"{name}: x has shape {shape}; an empty sequence or batch has nothing to attend to")
        pattern = self._pattern(x, context)
        if pattern not in self.card.patterns or (pattern is Pattern.GRID and context is not None):
            hint = ""
            if context is None and any(p.cross for p in self.card.patterns):
                hint = "; context is missing"
            elif context is not None and not any(p.cross for p in self.card.patterns):
                hint = "; context was not expected"
            raise ValueError(f"{name} cannot be called {pattern.value}{hint}; it declares {self._declared()}")
        if context is not None:
            self._check_context(x, context)
        elif self.source_dim not in (None, self.dim):
            raise ValueError(f"{name}: built for a context of {self.source_dim} features; context is missing")
        return pattern

    def _check_context(self, x: Tensor, context: Context) -> None:
        if not isinstance(context, (Tensor, Sequence)):
            raise ValueError(f"{self.card.name}: context is a {type(context).__name__}; want a tensor")
        parts = [context] if isinstance(context, Tensor) else list(context)
        if len(parts) != self.sources or (isinstance(context, Tensor) and self.sources > 1):
            raise ValueError(
                f"{self.card.name}: {len(parts)} context(s) given, {self.sources} wanted"
                + (" as a tuple of tensors, one per source" if self.sources > 1 else " as one tensor")
            )
        for part in parts:
            if not isinstance(part, Tensor):
                raise ValueError(f"{self.card.name}: a context is a {type(part).__name__}; want a tensor")
            self._check_kind("context", part, x.device)
            shape, wide = tuple(part.shape), self.source_dim or self.dim
            if part.ndim != 3 or shape[0] != x.shape[0] or shape[2] != wide or shape[1] == 0:
                raise ValueError(
                    f"{self.card.name}: context has shape {shape}; want [{x.shape[0]}, m >= 1, {wide}] "
                    f"for x of shape {tuple(x.shape)}"
                )

    def _check_kind(self, what: str, tensor: Tensor, device: torch.device) -> None:
        """Refuses tensors that no mechanism computes with."""
        if tensor.layout is not torch.strided or tensor.dtype not in _FLOATING or tensor.device != device:
            raise ValueError(
                f"{self.card.name}: {what} is {tensor.dtype}, {tensor.layout} on {tensor.device}; want a dense tensor "
                f"of float16, bfloat16, float32 or float64 on {device}"
            )

    def _unlike(self, x: Tensor, context: Context | None) -> str | None:
        """What does not fit together, of a pass that torch broke off: its own words name no argument. Asked only then,
        since under autocast, and for parameters that are kept in another dtype, differences are right."""
        given = [x, *([] if context is None else [context] if isinstance(context, Tensor) else context)]
        weights = [p for p in self.parameters() if p.is_floating_point()]
        kinds = [sorted({f"{t.dtype} on {t.device}" for t in some}) for some in (given, weights)]
        if len(kinds[0]) == 1 and kinds[1] in ([], kinds[0]):
            return None
        return (
            f"{self.card.name}: what was given is {' and '.join(kinds[0])}, the module's weights are "
            f"{' and '.join(kinds[1])}; bring them together with .to(...)"
        )

    def _check_mask(self, pattern: Pattern, x: Tensor, context: Any, mask: Any, state: State | None) -> tuple[Any, Any]:
        if mask is None:
            return None, None
        if self.sources > 1:
            if not isinstance(mask, Sequence) or len(mask) != self.sources:
                raise ValueError(
                    f"{self.card.name}: mask must be a tuple of {self.sources} key paddings, one per source"
                )
            for part, source in zip(mask, context, strict=True):
                self._want_mask(part, [tuple(source.shape[:2])], x.device)
            return tuple(mask), None
        batch = x.shape[0]
        if pattern is Pattern.GRID:
            self._want_mask(mask, [tuple(x.shape[:3])], x.device)
            return mask, None
        n = x.shape[1]
        new = n if context is None else context.shape[1]
        total = new + (state.length if state is not None and context is None else 0)
        wide = [] if total == new else [(batch, total)]
        self._want_mask(mask, [(batch, new), *wide, (batch, 1, n, total), (batch, self.heads, n, total)], x.device)
        return (mask, None) if mask.ndim == 2 else (None, mask)

    def _want_mask(self, mask: Any, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        if not isinstance(mask, Tensor):
            raise ValueError(f"{self.card.name}: mask is a {type(mask).__name__}; want a boolean tensor")
        if mask.dtype != torch.bool:
            raise ValueError(
                f"{self.card.name}: mask has dtype {mask.dtype}; want torch.bool with True = may attend "
                "(for a 0/1 attention mask: mask.bool(); for an additive one: mask == 0)"
            )
        if mask.device != device or mask.layout is not torch.strided:
            raise ValueError(f"{self.card.name}: mask is {mask.layout} on {mask.device}; want it dense, on {device}")
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(str(list(s)) for s in dict.fromkeys(shapes))
            raise ValueError(f"{self.card.name}: mask has shape {tuple(mask.shape)}; want {wanted}")

    def _check_state(self, x: Tensor, state: State | None) -> None:
        if state is None:
            return
        if not isinstance(state, State):
            raise ValueError(
                f"{self.card.name}: state is a {type(state).__name__}; want what this module's init_state gives"
            )
        if not self.causal:
            raise ValueError(
                f"{self.card.name}: a state was given to a module built with causal=False, where later tokens change "
                "earlier outputs; build it with causal=True to decode"
            )
        if state.owner != self.card.name:
            raise ValueError(
                f"{self.card.name}: the state given belongs to {state.owner}; use this module's init_state"
            )
        if state.config is not self.config and state.config not in (None, self.config):
            theirs = {k: v for k, v in state.config.items() if v != self.config[k]}
            raise ValueError(
                f"{self.card.name}: the state given was made by a module with {theirs}, this one has "
                f"{ ({k: self.config[k] for k in theirs}) }; use this module's init_state"
            )
        if state.batch != x.shape[0]:
            raise ValueError(
                f"{self.card.name}: the state is for batch {state.batch}, x has batch {x.shape[0]}; "
                "make a new one with init_state, or select rows with state.reorder"
            )

    def _check_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        if not isinstance(positions, Tensor):
            raise ValueError(f"{self.card.name}: positions is a {type(positions).__name__}; want a tensor of integers")
        positions = positions[None] if positions.ndim == 1 else positions
        whole = positions.dtype in _WHOLE and positions.ndim == 2 and positions.device == x.device
        if not whole or positions.shape[0] not in (1, x.shape[0]) or positions.shape[1] != x.shape[1]:
            raise ValueError(
                f"{self.card.name}: positions have shape {tuple(positions.shape)} and dtype {positions.dtype} on "
                f"{positions.device}; want integers [{x.shape[1]}] or [{x.shape[0]}, {x.shape[1]}] on {x.device}"
            )
        return positions.long()  # in a byte, twice a place of 200 is 144

    def _split_heads(self) -> int:
        """dim / heads, for mechanisms that cut the model dimension into equal heads."""
        if self.dim % self.heads:
            near = [h for h in range(1, self.dim + 1) if self.dim % h == 0]
            raise ValueError(
                f"{self.card.name}: dim={self.dim} is not divisible by heads={self.heads}; heads can be one of {near}"
            )
        return self.dim // self.heads
