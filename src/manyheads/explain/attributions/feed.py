"""What goes into a model and what is asked of what comes out: named inputs, the token stream they make, the score."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.embedded import embedded, embeddings_of
from manyheads.hosts.device import frozen
from manyheads.hosts.patches import Patches, find_patches
from manyheads.hosts.positions import placed, room

# The model's output -> one number per row of the batch.
Score = Callable[[Any], Tensor]
# A place in the sequence: one for all rows, one per row, "mean" of all real tokens, "all", or None: the model's own.
Position = int | Sequence[int] | Tensor | str | None
Target = int | Sequence[int] | Tensor | None


_one = RLock()


@dataclass(frozen=True)
class Feed:
    """A model's inputs by name. vectors: what stands in the place of the embeddings of token ids, by their name."""

    model: nn.Module
    named: dict[str, Any]
    vectors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, additional: Any = None) -> Feed:
        """inputs: a tensor, the model's first argument, or a mapping by name. additional: what follows it, a mapping, a
        tuple in the forward's order, or one value."""
        named = dict(inputs) if isinstance(inputs, Mapping) else {}
        order = [inputs] if not isinstance(inputs, Mapping) else []
        if isinstance(additional, Mapping):
            named |= additional
        elif additional is not None:
            order += list(additional) if isinstance(additional, tuple) else [additional]
        feed = cls(model, {name: _outside(value) for name, value in {**_by_name(model, order), **named}.items()})
        feed._check()
        return feed

    def __call__(self, **changes: Any) -> Any:
        named = placed(self.model, {**self.named, **changes})
        if not self.vectors:
            return self.model(**named)
        with embedded(self.model, named, self.vectors):
            return self.model(**named)

    def plain(self) -> Any:
        """A pass without a cache, where the model has one."""
        return self(use_cache=False) if self.takes("use_cache") else self()

    def embeddings(self) -> dict[str, Tensor]:
        """The vectors of its token ids, by their name, as the model looks them up."""
        return embeddings_of(self.model, self.named)

    @property
    def main(self) -> str:
        """The name of the input that tokens come from."""
        for name in ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values"):
            if self.named.get(name) is not None:
                return name
        return next(name for name, value in self.named.items() if isinstance(value, Tensor))

    @property
    def rows(self) -> int:
        return int(self.named[self.main].shape[0])

    @property
    def device(self) -> torch.device:
        return torch.device(self.named[self.main].device)

    @cached_property
    def patches(self) -> Patches:
        """Where the patches of its pixel values are; ValueError where that is not known."""
        others = {name: value for name, value in self.named.items() if name != "pixel_values"}
        return find_patches(self.model, self.named["pixel_values"], **others)

    def takes(self, name: str) -> bool:
        return name in _signature(self.model).parameters

    def row(self, index: int) -> Feed:
        """One row of the batch."""
        b = self.rows
        cut = dict(self.named)
        for name, value in self.named.items():
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == b:
                cut[name] = value[index : index + 1]
        return Feed(self.model, cut)

    def tiled(self, times: int, rows: int, more: dict[str, Any]) -> Feed:
        """The batch of so many rows, so many times one after the other, and what comes with it as it is."""
        same = {
            name: value.repeat(times, *[1] * (value.dim() - 1))
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
            else value
            for name, value in self.named.items()
        }
        return Feed(self.model, {**same, **more})

    def repeated(self, times: int, changes: dict[str, Any]) -> Feed:
        """A batch of one row, so many times, and what is changed in it."""
        return self.tiled(times, 1, changes)

    def real(self, stream: str, n: int, both: bool) -> Tensor:
        """[b, n], True where a token of the stream is no padding. both: the model has an encoder and a decoder."""
        name = "decoder_attention_mask" if both and stream == "decoder" else "attention_mask"
        name = "visual_attention_mask" if stream == "vision" else name
        mask = self.named.get(name)
        device = self.named[self.main].device
        if mask is None or mask.dim() != 2 or mask.shape[1] != n:
            return torch.ones(self.rows, n, dtype=torch.bool, device=device)
        real = mask.to(device) > 0
        if not bool(real.any(-1).all()):
            raise ValueError(f"{name} leaves row {int((~real.any(-1)).nonzero()[0])} with no token: drop that row")
        return real

    def _check(self) -> None:
        for name, value in self.named.items():
            if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                raise ValueError(f"{name} holds NaN")
        if not any(isinstance(value, Tensor) for value in self.named.values()):
            given = sorted(self.named) or "nothing"
            raise ValueError(f"no input tensor among {given}: give token ids [b, n] or a mapping of inputs")
        first = self.named[self.main]
        if first.numel() == 0:
            raise ValueError(f"{self.main} is empty, {list(first.shape)}: give at least one row of one token")
        for name in ("input_ids", "decoder_input_ids"):
            if self.named.get(name) is not None:
                self._check_ids(name, self.named[name])

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"{name} are {ids.dtype} {list(ids.shape)}: give integer token ids [b, n]")
        config: Any = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        words = getattr(config, "vocab_size", None)
        if words is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words:
            raise ValueError(f"{name} run from {int(ids.min())} to {int(ids.max())}; the vocabulary has {words}")
        longest = room(self.model)
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(f"{name} are {ids.shape[1]} tokens; the model has {longest} positions: shorten the text")


def _signature(model: Any) -> inspect.Signature:
    """What the model's forward takes; an adapter without a task hands whatever it gets to the model within."""
    found = inspect.signature(model.forward)
    bare = all(own.kind in (own.VAR_POSITIONAL, own.VAR_KEYWORD) for own in found.parameters.values())
    return _signature(model.get_base_model()) if bare and hasattr(model, "get_base_model") else found


def _by_name(model: nn.Module, order: list[Any]) -> dict[str, Any]:
    try:
        bound = _signature(model).bind_partial(*order)
    except TypeError as error:
        raise ValueError(f"{type(model).__name__} does not take {len(order)} inputs in a row: {error}") from error
    if any(isinstance(value, tuple) for value in bound.arguments.values()) and len(bound.arguments) < len(order):
        raise ValueError(f"{type(model).__name__} does not name its inputs: wrap it in a module whose forward does")
    return dict(bound.arguments)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """In eval mode and with frozen parameters, so that a backward pass leaves nothing behind; then as it was. One
    thread at a time, since modes, parameters and taps are the model's. Not in inference mode, which keeps no graph."""
    with _one, torch.inference_mode(False), frozen(model):
        yield


def _outside(value: Any) -> Any:
    """A tensor of inference mode as one that a graph may keep."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def per_row(wanted: Any, rows: int, what: str, device: torch.device) -> Tensor:
    """An int, or one per row, as [rows]."""
    try:
        found = torch.as_tensor(wanted, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is {wanted!r}: give an integer, or one for each of the {rows} rows") from error
    if found.is_floating_point() or found.dtype == torch.bool or found.dim() > 1 or found.numel() not in (1, rows):
        raise ValueError(f"{what} is {wanted!r}: give an integer, or one for each of the {rows} rows")
    return found.reshape(-1).long().expand(rows)


def places(position: Any, real: Tensor, last: bool) -> Tensor:
    """[b], the positions asked for; by default the last real token, or the first where last is False."""
    b, n = real.shape
    if position is None:
        order = torch.arange(n, device=real.device)
        return (real * (order + 1)).argmax(-1) if last else (real * (n - order)).argmax(-1)
    found = per_row(position, b, "position", real.device)
    if not bool(((found >= -n) & (found < n)).all()):
        raise ValueError(f"position {position} is outside the sequence of {n} tokens")
    return found % n


def logits_of(output: Any) -> Tensor | None:
    """[b, classes] or [b, n, vocabulary]; None where the output has none."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() in (2, 3) else None


def score_of(output: Any, feed: Feed, target: Target, position: Position, score: Score | None) -> Tensor:
    """[b]: what is explained. Logits [b, classes]: that of the target. [b, n, vocabulary]: that of the target at the
    position, the last real token by default. Anything else needs `score`."""
    if score is not None:
        found = score(output)
        if not isinstance(found, Tensor) or found.shape != (feed.rows,):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"score gave {shape}; it must give one number per row, [{feed.rows}]")
        return found
    logits = logits_of(output)
    if logits is None:
        raise ValueError(
            f"{type(feed.model).__name__} gives {type(output).__name__} without logits: a target means nothing there; "
            "give score=, a function of the output with one number per row (say its embedding's norm or similarity)"
        )
    if target is None:
        raise ValueError(f"which of the {logits.shape[-1]} outputs is to be explained? give target=")
    chosen = per_row(target, feed.rows, "target", logits.device)
    if not bool(((chosen >= 0) & (chosen < logits.shape[-1])).all()):
        raise ValueError(f"target {target} is not one of the model's {logits.shape[-1]} outputs")
    return at_place(logits, feed, position).gather(1, chosen[:, None])[:, 0]


def said_of(model: Any, logits: Tensor) -> Tensor:
    """What a model says by its logits [..., classes or vocabulary]: probabilities, of one among all or, of several
    labels or a lone one, of each by itself; of a regression the numbers as they are."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "regression":
        return logits
    alone = problem == "multi_label_classification" or logits.shape[-1] == 1
    return logits.sigmoid() if alone else logits.softmax(-1)


def at_place(logits: Tensor, feed: Feed, position: Position) -> Tensor:
    """[b, classes] of [b, n, classes] at the position; logits [b, classes] stay."""
    if logits.dim() == 2:
        return logits
    if isinstance(position, str):
        raise ValueError(f"position={position!r} names no single token, and the logits are {list(logits.shape)}")
    mask = feed.named.get("attention_mask")
    if feed.takes("decoder_input_ids"):
        mask = feed.named.get("decoder_attention_mask")
    real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if mask is not None and mask.shape == real.shape:
        real = mask.to(real.device) > 0
    chosen = places(position, real, last=True)
    return logits[torch.arange(feed.rows, device=logits.device), chosen]
