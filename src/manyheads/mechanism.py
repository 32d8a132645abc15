"""The outer contract: what every mechanism takes, gives and refuses."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.checks import Checks, Context
from manyheads.finite import blanked, broken_tokens
from manyheads.inner import Across, Inner, Listener
from manyheads.signature import checked_arguments
from manyheads.state import State

_NO_LOSSES: Mapping[str, Tensor] = {}


class Result(NamedTuple):
    """output: [batch, n, dim] ([batch, height, width, dim] for a grid, [batch, dim] for a pool; for maps one map, or a
    tuple of them). weights: the effective [batch, heads, n, m] matrix where asked for. losses: auxiliary losses by
    name, scalars, unweighted."""

    output: Any
    weights: Tensor | None = None
    losses: Mapping[str, Tensor] = _NO_LOSSES


@dataclass(slots=True)
class Call:
    """One checked call. padding: [batch, m], True = real, of the tokens of this pass (or of the context; a tuple, one
    per source or map, where there are several). dense: [batch, 1 or heads, n, m]. positions: [batch or 1, n], given
    or None; `query_positions` fills in the default. inputs: what the call was given by name beside x. across: x is part
    of a sequence, and this reads the rest."""

    pattern: Pattern
    padding: Any = None
    dense: Tensor | None = None
    positions: Tensor | None = None
    state: State | None = None
    need_weights: bool = False
    inputs: Mapping[str, Any] = field(default_factory=dict)
    across: Across | None = None

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


class Mechanism(Checks, ABC):
    """A published way to attend. Subclasses are final; they carry a `card` and write `attend`.

    Every constructor takes `dim, heads` and then keywords, `causal` among them, all of them JSON values (or a
    `Rotary`); `config` gives them back.
    """

    spread_over: Across | None = None  # reads tokens of other processes, of which x is a part; see `card.parallel`
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
        x: Any,
        context: Context | None = None,
        *,
        mask: Tensor | Sequence[Tensor] | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
        need_weights: bool = False,
        **inputs: Any,
    ) -> Result:
        """Attends from x to itself, or to the context.

        x: [batch, n, dim], or as the card's pattern has it. context: [batch, m, dim], for cross attention. mask:
        boolean, True = may attend; [batch, m] is key padding (of this pass's tokens, or of the context), [batch, 1 or
        heads, n, m] is dense (over all keys, those in the state too). With a state key padding may be of every token
        seen, [batch, seen + n]: it hides and shows earlier ones from this pass on, or is refused by a state that has
        summed them up. positions: integers [n] or [batch, n], counted on from the state by default. With a state the
        pass continues where the last one ended; a context is then read once. A row with nothing to attend to gives
        zeros. inputs: what the card takes by name, and for a graph its edges. Maps: x and mask are tuples, [batch,
        height, width, features] and [batch, height, width] each; what is padded there reads as zero. Raises ValueError
        for what the mechanism does not declare.
        """
        pattern = self._check_inputs(x, context, inputs)
        if pattern is Pattern.MAPS:
            return self._over_maps(x, mask, positions, state, need_weights, inputs)
        self._check_state(x, state)
        padding, dense = self._check_mask(pattern, x, context, mask, state)
        if positions is not None:
            positions = self._check_positions(x, positions)
        call = Call(
            pattern,
            padding,
            dense,
            positions,
            state,
            need_weights,
            inputs,
            self._asked_across(pattern, dense, state, need_weights),
        )
        broken = broken_tokens(x)
        for value in self._beside(x, inputs).values():  # NaN in a later token's is no less to be kept from earlier ones
            strange = broken_tokens(value.flatten(2))
            broken = strange if broken is None else broken if strange is None else broken | strange
        if context is not None and padding is not None:
            context = _without_broken_padding(context, padding)
        try:
            if call.across is not None and broken is not None:
                # What is real spreads as NaN: other processes do not know of it.
                return self._pass(x if padding is None else blanked(x, broken & ~padding), context, call)
            if broken is not None or (state is not None and state.broken is not None):
                return self._past_broken(x, context, call, broken)
            return self._pass(x, context, call)
        except RuntimeError as error:
            why = self._why_broken(error, x, context, state)
            if why is None:
                raise
            raise ValueError(why) from error

    def _why_broken(self, error: RuntimeError, x: Any, context: Context | None, state: State | None) -> str | None:
        """In words of the call, where dtypes or devices broke a pass off: no memory, or a hook, is not its doing."""
        strange = x.is_meta or any(word in str(error) for word in ("type", "device", "meta"))
        why = self._unlike(x, context, state) if strange and not torch.compiler.is_compiling() else None
        if why is None and x.is_meta:
            why = f"{self.card.name}: its pass looks at numbers, which tensors on meta lack; give it some on a device"
        return why

    def _asked_across(
        self, pattern: Pattern, dense: Tensor | None, state: State | None, need_weights: bool
    ) -> Across | None:
        if self.spread_over is None:
            return None
        given = {
            pattern.value: pattern is not Pattern.CAUSAL_SELF,
            "a dense mask": dense is not None,
            "a state": state is not None,
            "need_weights=True": need_weights,
            "a listener": self.listener is not None,  # it would take this process's keys for all
        }
        strange = [what for what, there in given.items() if there]
        if strange:
            raise ValueError(
                f"{self.card.name}: {strange[0]} was given with a sequence over several processes; want causal "
                "self-attention in one pass, with no mask but key padding"
            )
        return self.spread_over

    def _over_maps(self, x: Any, mask: Any, positions: Any, state: Any, need_weights: bool, inputs: Any) -> Result:
        for what, given in (("positions", positions), ("a state", state)):
            if given is not None:
                raise ValueError(f"{self.card.name}: {what} given for maps, which have no order; leave it out")
        masks, _ = self._check_mask(Pattern.MAPS, x, None, mask, None)
        maps = tuple(x) if masks is None else tuple(blanked(one, ~real) for one, real in zip(x, masks, strict=True))
        try:
            return self._attended(maps, None, Call(Pattern.MAPS, masks, need_weights=need_weights, inputs=inputs))
        except RuntimeError as error:
            why = self._why_broken(error, maps[0], maps[1:], None)
            if why is None:
                raise
            raise ValueError(why) from error

    def _attended(self, x: Any, context: Any, call: Call) -> Result:
        result = self.attend(x, context, call)  # what a caller adds to its losses must not be in those of other calls
        return result._replace(losses={}) if result.losses is _NO_LOSSES else result

    def _pass(self, x: Tensor, context: Context | None, call: Call) -> Result:
        """Attends; a pass that breaks off leaves the state as it was."""
        state = call.state
        if state is None:
            return self._attended(x, context, call)
        restore = state.keep()
        given = [x, *([context] if isinstance(context, Tensor) else context or ()), *call.inputs.values()]
        try:
            learns = (isinstance(t, Tensor) and t.requires_grad for t in (*given, *self.parameters()))
            state.begin(read_again=torch.is_grad_enabled() and any(learns))
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
        dropped = broken if call.pattern.causal else broken & ~real
        zeros = {k: blanked(v.flatten(2), dropped).view_as(v) for k, v in self._beside(x, call.inputs).items()}
        call = replace(call, inputs={**call.inputs, **zeros})
        result = self._pass(blanked(x, dropped), context, call)
        if not call.pattern.causal:
            return result
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

    def _beside(self, x: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a call gives by name of features [b, n, ...] for the tokens of x."""
        if not inputs:
            return {}
        named = {k: inputs[k] for k, what in self.card.takes.items() if what.startswith("[b, n, ") and k in inputs}
        tensors = {k: v for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 2}
        return {k: v for k, v in tensors.items() if v.shape[:2] == x.shape[:2] and v.device == x.device}

    def _continue(self, x: Tensor, context: Context | None, call: Call, state: State) -> Result:
        """A pass behind those that the state has seen; told what of them is real from now on, it counts on."""
        own, seen = context is None, state.length
        if own and call.padding is not None and call.padding.shape[1] > x.shape[1]:
            state.tell(call.padding[:, :seen])
            call = replace(call, padding=call.padding[:, seen:])
        if own and call.dense is not None:
            call = replace(call, dense=state.as_stored(call.dense))
        places = state.places
        result = self._attended(x, context, call)
        state.note(call.padding if own else None, seen)
        return result if result.weights is None else result._replace(weights=state.as_fed(result.weights, places))

    def result_size(self, *size: Any) -> Any:
        """The height and width of the result for those of x, and for maps, from one pair per map, the pair of the
        result or a tuple of pairs; the card's `resizes` in numbers."""
        return size

    def map_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Sizes of maps that fit together behind a first of height x width: each half of the one before, rounded up,
        unless a mechanism wants others. What fits beside these is the mechanism's to say."""
        sizes = [(height, width)]
        for _ in (self.map_dims or ())[1:]:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        return tuple(sizes)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        """What the card takes by name, small and always the same, for tests: for a batch of one of n tokens, of which
        the first k get what k tokens would (and where the card says [b, n ...], any token may get any of it); for a
        graph, what goes with these edges [2, e]."""
        return {}

    @abstractmethod
    def attend(self, x: Any, context: Any, call: Call) -> Result:
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
