"""Tokens leave between layers: the shape that the papers of this room share.

with thinned(model, rule):              # rule(step) -> which tokens [b, q] stay, before every layer of a prompt's pass
    model.generate(**inputs)

Hidden states, cache, rotary positions and masks are those of the tokens that stay: later layers compute on fewer, and
hold fewer. A token keeps the position that it had. What the tokens that stay compute is what the whole model would,
were the keys of those that left hidden from that layer on.

Legend: b batch, n tokens fed in a pass, q those of them that are still there, D width.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.cache_names import given_cache
from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.generation import intercepted
from manyheads.hosts.sites import Site, choose, shows_pictures_to_text, text_stack
from manyheads.hosts.switching import uncompiled
from manyheads.hosts.taps import tap
from manyheads.hosts.thin import mark_thin
from manyheads.hosts.wrappers import inside
from manyheads.mechanism import Mechanism
from manyheads.steer.thinning.passes import Pass


@dataclass(frozen=True)
class Step:
    """What a rule is told before layer `layer` of a pass that holds image tokens: states [b, q, D]; places [b, q] in
    what was fed in this pass; image and text [b, q]: which are image tokens, and which are words (neither padding nor
    the filling of shorter rows). start: tokens that the cache held before."""

    layer: int
    states: Tensor
    places: Tensor
    image: Tensor
    text: Tensor
    start: int


class Kept(NamedTuple):
    """stays [b, q] bool; states [b, q, D] in the place of the step's, where tokens were merged."""

    stays: Tensor
    states: Tensor


# Models inside a block.
_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()

Rule = Callable[[Step], Tensor | Kept | None]
Read = Callable[[AttentionCall, Step], None]


@contextmanager
def thinned(
    model: nn.Module,
    rule: Rule,
    *,
    watch: Sequence[int] = (),
    read: Read | None = None,
    settle: int | None = None,
) -> Iterator[Thinning]:
    """Image tokens leave the language part of a LLaVA-shaped model where the rule says so.

    rule(step) is asked before every layer in passes that hold image tokens, and gives None (all stay), a bool tensor
    [b, q] of those that stay, or Kept. Words stay whatever it says, and padding goes with the first that leave.
    read(call, step): what the layers of `watch` attended to in such a pass, before the next layer's rule is asked.
    settle: once such a pass is through, caches from that layer on hold of it only what the last layer saw. A logit of a
    token that left is of the state in which it left; hidden states that the model is asked for are as long as what the
    layer saw. Inside the block a cache is a ThinCache, which can only be fed inside of one. Refused: prompts without
    image tokens, calls without input_ids, packed rows, masks of the caller's own, models whose layers take other inputs
    for every token.
    """
    whole = inside(model)
    thinning = Thinning(whole, rule, read, settle)
    if whole in _OPEN:
        raise ValueError(
            f"image tokens of this {type(whole).__name__} leave by another block already: leave that first"
        )
    with ExitStack() as stack:
        _OPEN.add(whole)
        stack.callback(_OPEN.discard, whole)
        stack.enter_context(uncompiled())
        stack.enter_context(intercepted(whole, thinning.cache))
        if watch:
            layers = sorted({int(layer) for layer in watch})
            stack.enter_context(tap(whole, thinning.reader, layers=layers, stack=text_stack(whole), kind="self"))
        for hook in thinning.hooks():
            stack.callback(hook.remove)
        stack.callback(thinning.forget)
        yield thinning


def text_layers(model: Any) -> list[nn.Module]:
    """The decoder layers that read the text and the image's tokens, in order; ValueError for other models."""
    name = type(model).__name__
    if not shows_pictures_to_text(model):
        raise ValueError(f"{name} has no image tokens in its text (no image_token_id in its config): none could leave")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation or "sdpa"
    if implementation.startswith(("flex", "flash")):
        raise ValueError(f'{name} attends by {implementation!r}: set_attn_implementation("sdpa") for tokens to leave')
    found: list[Site] = choose(model, None, text_stack(model))
    parents = [site.path.rpartition(".")[0] for site in found]
    if (
        any(site.kind != "self" or isinstance(site.module, Mechanism) for site in found)
        or len({parent.rpartition(".")[0] for parent in parents}) != 1
    ):
        raise ValueError(f"{name}: image tokens can leave plain decoder layers alone; it has {parents}")
    return [model.get_submodule(parent) for parent in parents]


class Thinning:
    """What a block knows of its passes. image_tokens: per layer, how many of each row it saw in the last prompt."""

    def __init__(self, model: Any, rule: Rule, read: Read | None, settle: int | None):
        self._model, self._rule, self._read, self._settle = model, rule, read, settle
        self._layers = text_layers(model)
        self._attends = [site.module for site in choose(model, None, text_stack(model))]
        config = model.config
        token = getattr(config, "image_token_id", None)
        self._token: int = config.image_token_index if token is None else token
        self._heard: dict[str, Any] = {}
        self._added = 0
        self._now: Pass | None = None
        self._fed: Any = None
        self._last: Any = None
        self.image_tokens: list[list[int]] = []

    @property
    def depth(self) -> int:
        return len(self._layers)

    @property
    def held_bytes(self) -> int:
        """Of the keys and values of the last cache."""
        return 0 if self._last is None else sum(layer.nbytes for layer in self._last.layers)

    @property
    def full_bytes(self) -> int:
        """Of the same, had nothing left."""
        layers = [] if self._last is None else [layer for layer in self._last.layers if layer.is_initialized]
        return sum(layer.nbytes // layer.keys.shape[2] * layer.fed for layer in layers)

    def cache(self, given: Any) -> Any:
        from manyheads.steer.thinning.cache import thin_cache

        self._last = thin_cache(given, self.depth)
        return self._last

    def hooks(self) -> Iterator[Any]:
        model = self._model
        for own in {id(own): own for own in (model, model.base_model)}.values():
            yield own.register_forward_pre_hook(self._hear, with_kwargs=True)
        path = next(path for path, module in model.named_modules() if module is self._layers[0])
        text = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
        yield text.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, layer in enumerate(self._layers):
            yield layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
        yield self._layers[-1].register_forward_hook(self._after)

    def forget(self) -> None:
        for module in self._attends:
            mark_thin(module, False)

    def reader(self, call: Any) -> None:
        step = self.step(call.layer)
        if self._read is not None and step is not None:
            with torch.no_grad():  # what stays is a choice: no gradient goes through it
                self._read(opened(call, "a rule of thinning"), step)

    def step(self, layer: int) -> Step | None:
        """While that layer runs in a pass with image tokens: what is there, without its states."""
        return self._step(layer, self._now, self._now.none) if self._now is not None and self._now.has_image else None

    def spread(self, columns: Tensor) -> Tensor:
        """Of the layer that runs: what its keys got, [..., m] of one row without a past -> [..., n] of all that was
        fed, zeros where a token had left."""
        now = self._now
        if now is None or not now.left or now.start:
            return columns
        whole = torch.zeros(*columns.shape[:-1], now.image.shape[1], dtype=columns.dtype, device=columns.device)
        return whole.index_copy(-1, now.places[0], columns)

    def _hear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        heard = dict(zip(names, args, strict=False)) | kwargs
        self._heard = {name: heard.get(name) for name in ("input_ids", "attention_mask")}

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard, self._heard = self._heard, {}
        ids, mask = heard.get("input_ids"), heard.get("attention_mask")
        if ids is None:
            raise ValueError(
                "image tokens are known by their ids: call the model itself, with input_ids (not inputs_embeds alone)"
            )
        # Features of pictures that are added once more behind each of the first layers, to all of their tokens.
        self._added = len(kwargs.get("deepstack_visual_embeds") or ())
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            kwargs = {**kwargs, "attention_mask": mask}  # what layers get is made of this one by the model
        self._now = now = Pass.of(ids, ids == self._token, kwargs)
        if now.has_image:
            self.image_tokens = []
        elif not now.start:
            raise ValueError(f"no image token (id {self._token}) in the prompt: nothing could leave")

    def _before(self, index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            now = self._now
            assert now is not None
            states, *rest = args if args else (kwargs.pop("hidden_states"),)
            if now.has_image:
                states = self._asked(index, now, states)
            self._fed = cache = given_cache(kwargs)
            held = None if cache is None else cache.layers[index]
            mark_thin(self._attends[index], now.left or (held is not None and held.places is not None))
            return (states, *rest), now.fitted(kwargs, held)

        return before

    def _asked(self, index: int, now: Pass, states: Tensor) -> Tensor:
        found = self._rule(self._step(index, now, states))
        if found is not None:
            stays, states = found if isinstance(found, Kept) else (found, states)
            states = now.leave(stays, states)
        if now.left and index < self._added:
            raise ValueError(
                f"{type(self._model).__name__} adds what it sees to its image tokens behind each of its first "
                f"{self._added} layers: they can leave before layer {self._added} at the earliest; a rule had some "
                f"leave before layer {index}"
            )
        self.image_tokens.append(now.here(now.image).sum(1).tolist())
        return states

    def _step(self, index: int, now: Pass, states: Tensor) -> Step:
        return Step(index, states, now.places, now.here(now.image), now.here(now.real & ~now.image), now.start)

    def _after(self, module: Any, args: Any, output: Any) -> Any:
        now, self._now = self._now, None
        assert now is not None
        cache, self._fed = self._fed, None
        if cache is not None and now.left and self._settle is not None:
            for layer in cache.layers[self._settle :]:
                layer.retain(now.held, now.start)
        if isinstance(output, Tensor):
            return now.whole_again(output)
        return now.whole_again(output[0]), *output[1:]


def on_image(image: Tensor, each: Tensor) -> Tensor | None:
    """each: of the image tokens of a prompt's rows, row by row -> [b, q], zeros elsewhere; the rows of a batch that
    holds each prompt several times in a row (beams) alike. None where they are not as many."""
    times = int(image.sum()) // max(1, len(each))
    rows = image[:: max(1, times)]
    if int(rows.sum()) != len(each) or len(rows) * max(1, times) != len(image):
        return None
    placed = torch.zeros(rows.shape, dtype=each.dtype, device=each.device).masked_scatter(rows, each)
    return placed.repeat_interleave(max(1, times), 0)


def after_image(step: Step) -> Tensor:
    """[b, q] bool: the words after a row's last image token."""
    order = torch.arange(step.places.shape[1], device=step.places.device)
    last = torch.where(step.image, order, -1).amax(1, keepdim=True)
    return step.text & (order > last) & (last >= 0)
