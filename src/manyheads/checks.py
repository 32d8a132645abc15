"""What the contract refuses: the checks in front of every mechanism, each saying what was given and wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.card import Card, Pattern
from manyheads.state import State

Context = Tensor | Sequence[Tensor]
_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_FLOATING = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

# By whether the mechanism is causal, and whether it sees no context.
_OF_TOKENS = {
    (True, True): Pattern.CAUSAL_SELF,
    (True, False): Pattern.CAUSAL_CROSS,
    (False, True): Pattern.NONCAUSAL_SELF,
    (False, False): Pattern.NONCAUSAL_CROSS,
}


class Checks(nn.Module):
    """What a mechanism declares about itself, and the checks of a call that follow from it."""

    card: ClassVar[Card]
    config: dict[str, Any]
    dim: int
    heads: int
    causal: bool
    source_dim: int | None = None  # features of a context, where they are not those of x
    sources: int = 1  # how many contexts one call takes; more than one: context and mask are tuples
    map_dims: tuple[int, ...] | None = None  # features of each map of a call, where there are several maps
    map_axes: int = 2  # of each map: 3 for [batch, depth, height, width, features]
    result_dim: int | None = None  # features of the result, where they are not those of x

    def _declared(self) -> list[str]:
        return sorted(p.value for p in self.card.patterns)

    def _pattern(self, x: Tensor, context: Context | None, inputs: Mapping[str, Any]) -> Pattern:
        if x.ndim == 5 and context is None:
            return Pattern.VOLUME
        if x.ndim == 4:
            return Pattern.GRID if context is None else Pattern.GRID_CROSS
        if Pattern.GRAPH in self.card.patterns and context is None and ("edges" in inputs or self._only(Pattern.GRAPH)):
            return Pattern.GRAPH
        if Pattern.POOL in self.card.patterns and context is None:
            return Pattern.POOL
        return _OF_TOKENS[self.causal, context is None]

    def _only(self, pattern: Pattern) -> bool:
        return self.card.patterns == {pattern}

    def _shapes_of_x(self) -> str:
        """What x may look like, in words."""
        wanted = dict.fromkeys(
            "[batch, depth, height, width, {}]"
            if p is Pattern.VOLUME
            else "[batch, height, width, {}]"
            if p in (Pattern.GRID, Pattern.GRID_CROSS)
            else "[batch, n, {}]"
            for p in sorted(self.card.patterns - {Pattern.MAPS})
        )
        return " or ".join(wanted).format(*[self.dim] * len(wanted))

    def _check_inputs(
        self, x: Any, context: Context | None, inputs: Mapping[str, Any] = MappingProxyType({})
    ) -> Pattern:
        name = self.card.name
        if Pattern.MAPS in self.card.patterns and isinstance(x, Sequence):
            self._check_maps(x, context)
            self._check_named(Pattern.MAPS, x, inputs)
            return Pattern.MAPS
        if not isinstance(x, Tensor) or self._only(Pattern.MAPS):
            maps = f"{len(self.map_dims or ())} maps in a tuple" if Pattern.MAPS in self.card.patterns else ""
            wanted = " or ".join(w for w in (maps, self._shapes_of_x() and f"a tensor {self._shapes_of_x()}") if w)
            raise ValueError(f"{name}: x is a {type(x).__name__}; want {wanted}")
        shape = tuple(x.shape)
        if x.ndim not in (3, 4, 5) or shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"{name}: x has shape {shape} and dtype {x.dtype}; want floating point {self._shapes_of_x()}"
            )
        self._check_kind("x", x, x.device)
        if x.is_meta and (why := self._unlike(x, None)):  # what does not look at x would make numbers of nothing
            raise ValueError(why)
        if 0 in shape:
            raise ValueError(f"{name}: x has shape {shape}; an empty sequence or batch has nothing to attend to")
        pattern = self._pattern(x, context, inputs)
        if pattern not in self.card.patterns:
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
        self._check_named(pattern, x, inputs)
        return pattern

    def _check_maps(self, maps: Sequence[Any], context: Context | None) -> None:
        name, widths = self.card.name, self.map_dims or (self.dim,) * len(maps)
        if context is not None:
            raise ValueError(f"{name}: context was not expected beside maps; it declares {self._declared()}")
        if len(maps) != len(widths) or not maps:
            raise ValueError(f"{name}: {len(maps)} maps given; want {len(widths)}, of {list(widths)} features")
        sides = ", ".join(("depth", "height", "width")[-self.map_axes :])
        for i, (one, wide) in enumerate(zip(maps, widths, strict=True)):
            if not isinstance(one, Tensor):
                raise ValueError(f"{name}: map {i} is a {type(one).__name__}; want a tensor [batch, {sides}, {wide}]")
            self._check_kind(f"map {i}", one, maps[0].device)
            shape = tuple(one.shape)
            if one.ndim != self.map_axes + 2 or shape[-1] != wide or shape[0] != maps[0].shape[0] or 0 in shape:
                raise ValueError(
                    f"{name}: map {i} has shape {shape}; want [{maps[0].shape[0]}, {sides}, {wide}], no side of them 0"
                )

    def _check_named(self, pattern: Pattern, x: Any, inputs: Mapping[str, Any]) -> None:
        """What a call gives by name: all that the card asks for, and nothing else."""
        if not inputs and not self.card.takes and pattern is not Pattern.GRAPH:
            return
        takes = dict(self.card.takes)
        if pattern is Pattern.GRAPH:
            takes["edges"] = "[2, e] integers, sources above targets"
        strange = sorted(set(inputs) - set(takes))
        missing = [k for k, what in takes.items() if inputs.get(k) is None and not what.startswith("optional")]
        if strange or missing:
            raise ValueError(
                f"{self.card.name}: {f'unknown {strange}' if strange else f'{missing} missing'}; "
                + (f"it takes {takes}" if takes else "it takes nothing by name beside x")
            )
        if pattern is Pattern.GRAPH:
            self._check_edges(x, inputs["edges"])

    def _check_edges(self, x: Tensor, edges: Any) -> None:
        """An empty list, isolated nodes, loops and edges given twice are all right: each edge counts as often as it
        is given."""
        whole = isinstance(edges, Tensor) and edges.dtype == torch.int64 and edges.device == x.device
        if not whole or edges.ndim != 2 or edges.shape[0] != 2:
            given = f"{edges.dtype} {list(edges.shape)} on {edges.device}" if isinstance(edges, Tensor) else repr(edges)
            raise ValueError(f"{self.card.name}: edges are {given[:80]}; want int64 [2, e] on {x.device}")
        if torch.compiler.is_compiling() or edges.is_meta or not edges.numel():
            return
        low, high = int(edges.min()), int(edges.max())
        if low < 0 or high >= x.shape[1]:
            raise ValueError(
                f"{self.card.name}: edges name nodes {low} to {high}; want 0 to {x.shape[1] - 1}, as x has "
                f"{x.shape[1]} nodes"
            )

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

    def _unlike(self, x: Tensor, context: Context | None, state: State | None = None) -> str | None:
        """What does not fit together, of a pass that torch broke off: its own words name no argument. Asked only then,
        since under autocast, and for parameters that are kept in another dtype, differences are right."""
        given = [x, *([] if context is None else [context] if isinstance(context, Tensor) else context)]
        weights = [p for p in self.parameters() if p.is_floating_point()]
        kinds = [sorted({f"{t.dtype} on {t.device}" for t in some}) for some in (given, weights)]
        if len(kinds[0]) == 1 and kinds[1] in ([], kinds[0]):
            held = [] if state is None else state.kinds()
            if held in ([], kinds[0]):
                return None
            return (
                f"{self.card.name}: what was given is {kinds[0][0]}, the state holds {' and '.join(held)} of earlier "
                "passes; go on as it was begun, with the same dtype, device and autocast, or start a new state"
            )
        return (
            f"{self.card.name}: what was given is {' and '.join(kinds[0])}, the module's weights are "
            f"{' and '.join(kinds[1])}; bring them together with .to(...)"
        )

    def _check_mask(self, pattern: Pattern, x: Any, context: Any, mask: Any, state: State | None) -> tuple[Any, Any]:
        if mask is None:
            return None, None
        if pattern is Pattern.MAPS:
            if not isinstance(mask, Sequence) or len(mask) != len(x):
                raise ValueError(f"{self.card.name}: mask must be a tuple of {len(x)} paddings, one per map")
            for part, one in zip(mask, x, strict=True):
                self._want_mask(part, [tuple(one.shape[:-1])], one.device)
            return tuple(mask), None
        if self.sources > 1:
            if not isinstance(mask, Sequence) or len(mask) != self.sources:
                raise ValueError(
                    f"{self.card.name}: mask must be a tuple of {self.sources} key paddings, one per source"
                )
            for part, source in zip(mask, context, strict=True):
                self._want_mask(part, [tuple(source.shape[:2])], x.device)
            return tuple(mask), None
        batch = x.shape[0]
        if pattern in (Pattern.GRID, Pattern.VOLUME, Pattern.GRAPH):
            self._want_mask(mask, [tuple(x.shape[:-1])], x.device)
            return mask, None
        if pattern is Pattern.GRID_CROSS:
            self._want_mask(mask, [(batch, context.shape[1])], x.device)
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
        if x.ndim != 3:
            raise ValueError(f"{self.card.name}: positions given for a grid, which has its own; leave them out")
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
