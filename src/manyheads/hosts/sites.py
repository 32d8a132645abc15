"""Where a model attends: its attention layers by stack and kind, and which of them a caller means."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from manyheads.mechanism import Mechanism

# What modules of a stack are called by, as a part of their path begins.
_VISION = ("vision", "visual")
_LANGUAGE = ("text", "language")


@dataclass(frozen=True)
class Site:
    """A place where a model attends. layer counts from 0 within its stack and kind.

    stack: "encoder" or "decoder"; in a model of several modalities "vision", and "language" where text is read.
    kind: "self" or "cross". turn: which of the calls that its module gets in a layer, where it is shared by several.
    """

    layer: int
    stack: str
    kind: str
    path: str
    module: nn.Module = field(repr=False)
    turn: int = 0

    @property
    def name(self) -> str:
        """For messages: where it is, and which mechanism it is."""
        if isinstance(self.module, Mechanism):
            return f"{self.path} ({self.module.card.name})" if self.path else self.module.card.name
        return self.path or type(self.module).__name__


def sites(model: nn.Module) -> list[Site]:
    """Every place where the model attends, in the order of its modules; a ValueError if there is none."""
    crossing = _crossmodal(model)
    if crossing:
        return crossing
    places = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Mechanism) or dispatches(module) or by_processor(module)
    ]
    # A UNet of diffusers runs its middle before its way up, and lists it after.
    places.sort(key=lambda place: ".up_blocks." in f".{place[0]}." and by_processor(place[1]))
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be tapped: neither layers that use transformers' "
            "attention interface, manyheads mechanisms, nor layers with diffusers' attention processors"
        )
    found: list[Site] = []
    counts: dict[tuple[str, str], int] = {}
    for (path, module), stack in zip(places, _stacks(places), strict=True):
        kind = _kind(path, module)
        layer = counts.get((stack, kind), 0)
        counts[stack, kind] = layer + 1
        found.append(Site(layer, stack, kind, path, module))
    return found


def attends_alone(module: nn.Module) -> bool:
    """Whether the module is of LXMERT, which has attention of its own."""
    return type(module).__name__ == "LxmertAttention"


def by_processor(module: nn.Module) -> bool:
    """Whether the module is an attention layer of diffusers, which hands its passes to a processor."""
    return type(module).__name__ == "Attention" and type(module).__module__.startswith("diffusers.")


# Of LXMERT, in the order in which they run: what a path holds, the stack that reads, its kind, and the turn.
_LXMERT = (
    (".layer.", "language", "self", 0),
    (".r_layers.", "vision", "self", 0),
    (".visual_attention.", "language", "cross", 0),
    (".visual_attention.", "vision", "cross", 1),
    (".lang_self_att.", "language", "self", 0),
    (".visn_self_att.", "vision", "self", 0),
)


def _crossmodal(model: nn.Module) -> list[Site]:
    """LXMERT's sites: two towers that read themselves, then each other as well."""
    found: list[Site] = []
    counts: dict[tuple[str, str], int] = {}
    places = [(path, module) for path, module in model.named_modules() if attends_alone(module)]
    for part, stack, kind, turn in _LXMERT:
        for path, module in places:
            if part in f".{path}.":
                layer = counts.get((stack, kind), 0)
                counts[stack, kind] = layer + 1
                found.append(Site(layer, stack, kind, path, module, turn))
    return found


def dispatches(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' registry."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def remasks(module: nn.Module) -> bool:
    """Whether the module's forward makes another mask of the one that it is given."""
    code = inspect.unwrap(type(module).forward).__code__
    stored = [each.argval for each in dis.get_instructions(code) if "STORE_FAST" in each.opname]
    return any("attention_mask" in (names if isinstance(names, tuple) else (names,)) for names in stored)


def _kind(path: str, module: nn.Module) -> str:
    last = path.lower()
    crossing = "encoder_attn" in last or "encdec" in last or "cross" in last or "cross" in type(module).__name__.lower()
    return "cross" if crossing or getattr(module, "is_cross_attention", False) else "self"


def _stacks(places: list[tuple[str, nn.Module]]) -> list[str]:
    """The stack of every place. A text part that has an encoder and a decoder is known by these; a decoder beside a
    vision tower is the language part, whatever its modules are called."""
    named = [_named(path) or _halves(path) or _by_sight(module) for path, module in places]
    below = [_halves(path) for (path, _), stack in zip(places, named, strict=True) if stack == "language"]
    if {"encoder", "decoder"} <= set(below):
        named = [
            (_halves(path) or stack) if stack == "language" else stack
            for (path, _), stack in zip(places, named, strict=True)
        ]
    if set(named) == {"vision", "decoder"}:
        named = ["language" if stack == "decoder" else stack for stack in named]
    return named


def _named(path: str) -> str | None:
    for part in path.lower().split("."):
        for stack, beginnings in (("vision", _VISION), ("language", _LANGUAGE)):
            if part.startswith(beginnings):
                return stack
    return None


def _halves(path: str) -> str | None:
    return next((part for part in path.lower().split(".") if part in ("decoder", "encoder")), None)


def _by_sight(module: nn.Module) -> str:
    if by_processor(module):
        return "encoder"
    causal = module.causal if isinstance(module, Mechanism) else getattr(module, "is_causal", True)
    return "decoder" if causal else "encoder"


def choose(
    model: nn.Module, layers: Sequence[int] | None = None, stack: str | None = None, kind: str | None = None
) -> list[Site]:
    """The sites that are meant; all of them by default. ValueError where there are none, and for a layer number that
    several stacks have, when no stack is said."""
    everywhere, name = sites(model), type(model).__name__
    stack = known_stack(stack, {site.stack for site in everywhere})
    chosen = [
        site
        for site in everywhere
        if (layers is None or site.layer in set(layers)) and stack in (None, site.stack) and kind in (None, site.kind)
    ]
    missing = set(layers or ()) - {site.layer for site in chosen}
    if missing or not chosen:
        have = sorted({(site.stack, site.kind) for site in everywhere})
        deepest = max(site.layer for site in everywhere)
        raise ValueError(
            f"{name} has no such layers (layers={sorted(missing) or layers}, stack={stack}, "
            f"kind={kind}); it has layers 0 to {deepest} of {have}"
        )
    for layer in layers or ():
        several = list(dict.fromkeys(site.stack for site in chosen if site.layer == layer))
        if len(several) > 1:
            raise ValueError(f"{name} has a layer {layer} in each of {', '.join(several)}: say which by stack=")
    return chosen


def known_stack(stack: str | None, have: set[str]) -> str | None:
    """Text parts are called "language"; "text" and, where a model has no other, "decoder" mean the same."""
    return "language" if stack in ("text", "decoder") and stack not in have and "language" in have else stack


def only_stack(model: nn.Module, stack: str | None = None) -> str:
    """The one stack of self attention that is meant; ValueError where the model has several and none is said."""
    have = list(dict.fromkeys(site.stack for site in choose(model, None, stack, "self")))
    if len(have) > 1:
        raise ValueError(f"{type(model).__name__} attends in {', '.join(have)}: say which by stack=")
    return have[0]


def text_stack(model: nn.Module, stack: str | None = None) -> str:
    """The stack that places of text tokens are about: the language part beside a vision tower, or the only one."""
    have = {site.stack for site in sites(model)}
    return only_stack(model, "language" if stack is None and "language" in have else stack)


def answering_stack(model: nn.Module) -> str | None:
    """The stack at whose end the model's answer stands, of a model where one of several stacks only reads for it; None
    where every stack has its own answer, or there is only one."""
    have = {site.stack for site in sites(model)}
    if "decoder" in have and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "decoder"
    return "language" if len(have) > 1 and "language" in have and shows_pictures_to_text(model) else None


def shows_pictures_to_text(model: Any) -> bool:
    """Whether pictures become tokens of the text (LLaVA and its like), so that the text's stack reads them too."""
    config = getattr(model, "config", None)
    return any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))
